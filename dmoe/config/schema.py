"""Every knob of dmoe, with its default and one sentence of meaning under it.

The defaults *are* the quickstart: `dmoe train` without a file trains exactly this. A YAML file holds only what differs.
The docstrings below are not decoration: `dmoe explain` and `dmoe train --help` print them.

Letters: T tokens, D model width, F expert hidden width, E experts, K experts a token, W world size, EP expert-parallel degree.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional, Union

__all__ = [
    "BalanceConfig",
    "CapacityConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DebugConfig",
    "ExpertsConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RouterConfig",
    "TrackingConfig",
    "TrainConfig",
]

# OmegaConf reads these annotations at run time and knows Optional and Union, not the `X | Y` of strings: hence typing's names.


@dataclass(frozen=True)
class ModelConfig:
    dim: int = 128
    """Width D of the residual stream."""
    layers: int = 3
    """Number of transformer blocks."""
    heads: int = 4
    """Query heads of attention."""
    kv_heads: Optional[int] = None
    """Key/value heads (grouped-query attention); must divide heads. Default: as many as heads."""
    head_dim: Optional[int] = None
    """Width of one head. Default: dim / heads."""
    dense_dim: Optional[int] = None
    """Hidden width of a dense feed-forward. Default: the width that is active in a MoE layer, so both cost the same a token."""
    moe_every: int = 1
    """Every n-th block is a mixture of experts, the others are dense; 0 makes the whole model dense."""
    dense_first: int = 0
    """The first n blocks are dense whatever moe_every says (DeepSeekMoE keeps the first one dense)."""
    qk_norm: bool = True
    """RMSNorm on queries and keys, per head (Qwen3): keeps attention logits small."""
    tie_embeddings: bool = True
    """Use the token embedding as the output projection too."""
    rope_base: float = 10000.0
    """Base of the rotary position frequencies."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of the normal initialisation; output projections are divided by sqrt(2 * layers) (GPT-2)."""


@dataclass(frozen=True)
class RouterConfig:
    kind: Literal["top_k", "noisy", "group_limited", "adaptive", "fixed", "hash", "soft", "expert_choice"] = "top_k"
    """How a token's experts are chosen; one file each in dmoe/moe/routers."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """What turns logits into scores: softmax (Switch, Mixtral, OLMoE, Qwen) or sigmoid (DeepSeek-V3)."""
    weights_from: Literal["all", "chosen"] = "all"
    """Softmax over all E experts, or over the K chosen ones only."""
    renormalize: bool = True
    """Divide the chosen weights by their sum. Refused for top_k=1: every weight would be 1 and the router would learn nothing."""
    scale: float = 1.0
    """Factor on the weights, after renormalisation (DeepSeek's routed_scaling_factor)."""
    jitter: float = 0.0
    """Switch: in training the router sees its input times uniform noise in [1 - jitter, 1 + jitter]."""
    groups: int = 1
    """group_limited: experts form this many groups of neighbours (DeepSeek-V3's n_group)."""
    topk_groups: int = 1
    """group_limited: a token's experts come from its best so many groups."""
    top_p: float = 0.6
    """adaptive: a token takes experts until their probabilities sum to this."""
    k_min: int = 1
    """adaptive: it takes at least so many, and at most moe.top_k."""
    allow_future_leak: bool = False
    """expert_choice: accept that an expert's choice among a sequence's tokens looks at later ones, which a causal model must not."""


@dataclass(frozen=True)
class CapacityConfig:
    factor: Optional[float] = None
    """Slots an expert has, as a multiple of its fair share K*T/E; null is dropless."""
    eval_factor: Optional[float] = None
    """The same in evaluation and generation; null (default) is dropless."""
    min_capacity: int = 1
    """An expert never has fewer slots than this for one group."""
    group: Literal["rank", "sequence", "global"] = "rank"
    """Which tokens share a capacity: a rank's micro-batch (GShard), each sequence, or the global micro-batch (the last two drop the
    same tokens on any number of ranks)."""
    priority: Literal["position", "score"] = "position"
    """Who is served first: all first choices before all second ones in token order (GShard), or the higher router score."""
    renormalize: bool = False
    """Divide a token's surviving weights by their sum (DeepSpeed does this for K >= 2)."""
    overflow: Literal["drop", "next_choice"] = "drop"
    """What happens to an assignment without a slot: dropped, or offered once to the token's next eligible expert."""


@dataclass(frozen=True)
class BalanceConfig:
    switch: float = 0.01
    """Coefficient of the Switch loss E * sum_e f_e P_e, which is 1 at perfect balance for any K; 0 turns it off."""
    switch_level: Literal["sequence", "micro_batch", "global"] = "micro_batch"
    """The tokens over which f_e and P_e are taken; global takes f_e over all data ranks and the accumulation steps so far."""
    z: float = 0.001
    """Coefficient of the router z-loss mean(logsumexp(logits)^2) (ST-MoE): keeps router logits small; 0 turns it off."""
    importance: float = 0.0
    """Coefficient of the squared coefficient of variation of each expert's summed score (Shazeer 2017)."""
    load: float = 0.0
    """Coefficient of the same of the smooth load (Shazeer 2017, appendix A); needs the noisy router, whose noise makes it smooth."""
    usage_std: float = 0.0
    """Coefficient of the standard deviation of expert usage, the mean score of each expert."""
    bias: float = 0.0
    """Update rate u of the auxiliary-loss-free bias (DeepSeek-V3): after each step b_e += u * sign(mean load - load of e); 0: none."""
    recenter: bool = True
    """Subtract the mean of the bias after each update, so that it cannot drift."""


@dataclass(frozen=True)
class ExpertsConfig:
    kind: Literal["swiglu", "geglu", "gelu", "relu"] = "swiglu"
    """What an expert computes; swiglu and geglu are gated (three matrices), gelu and relu are not (two)."""
    shared: int = 0
    """Shared experts that every token passes beside the routed ones (DeepSeekMoE)."""
    shared_dim: Optional[int] = None
    """Hidden width of one shared expert. Default: expert_dim."""


@dataclass(frozen=True)
class MoEConfig:
    num_experts: int = 8
    """Routed experts E of one layer, over all ranks."""
    top_k: int = 2
    """Experts a token goes to."""
    expert_dim: int = 192
    """Hidden width F of one expert."""
    exchange: Literal["packed", "padded"] = "packed"
    """The all-to-all: packed sends exactly the rows there are (one host sync); padded sends fixed slots (none, needs a capacity)."""
    router: RouterConfig = field(default_factory=RouterConfig)
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)


@dataclass(frozen=True)
class ParallelConfig:
    ep: Union[int, str] = "auto"
    """Ranks that share one copy of the experts; must divide the world and num_experts. auto: the largest number that does."""
    mode: Literal["ddp", "fsdp"] = "ddp"
    """ddp keeps a copy of everything but the experts on every rank; fsdp (FSDP2) shards it over all ranks, and the experts over
    their copies."""
    virtual_ranks: int = 1
    """Routing groups inside each process: W processes with V virtual ranks train exactly as W*V processes with one."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Communication library; auto is nccl on CUDA and gloo on CPU."""
    start_timeout: float = 600.0
    """Seconds a rank waits for the others until the first step is done."""
    timeout: float = 120.0
    """Seconds a rank waits for the others afterwards."""


@dataclass(frozen=True)
class DataConfig:
    source: str = "stdlib"
    """stdlib (Python's own source), text files or globs separated by commas, a directory of shards, or synthetic:KIND."""
    seq_len: int = 128
    """Tokens a sequence; each token predicts the next one."""
    tokenizer: str = "bytes"
    """bytes, a tokenizers .json file, or a tiktoken rank file (.tiktoken, or Mistral's tekken.json)."""
    tokenizer_vocab: Optional[int] = None
    """Keep only the first n entries of a tiktoken vocabulary (any n >= 256 is a valid byte-pair encoding)."""
    holdout: float = 0.05
    """Share of the files, chosen by a hash of their content, that training never sees."""


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 600
    """Optimizer steps."""
    global_batch: int = 24
    """Sequences an optimizer step, over all ranks and accumulation steps; never depends on the world size."""
    micro_batch: Optional[int] = None
    """Sequences a (virtual) rank takes at once. Default: all of its share; smaller ones are accumulated."""
    seed: int = 0
    """Seed of initialisation, data order and noise."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto is bf16 where the hardware has it and it pays (CUDA; avx512_bf16 or amx on CPUs from model.dim=512 on), fp32 elsewhere."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where a GPU is visible."""
    run_dir: Optional[str] = None
    """Where the run is kept. Default: a new directory under runs/. A directory with a checkpoint is resumed."""
    recompute: bool = False
    """Recompute each block in backward instead of keeping its activations."""
    log_every: int = 10
    """Steps between two metric lines."""
    eval_every: int = 300
    """Steps between two evaluations; one more at the end. 0: only at the end."""
    eval_sequences: int = 512
    """Held-out sequences an evaluation reads."""
    sample_prompt: str = "def "
    """Text the sample at the end of a run starts with."""
    sample_tokens: int = 160
    """Tokens of that sample; 0 for none."""


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 0.004
    """Peak learning rate of AdamW."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices; norms, routers and embeddings have none."""
    clip: Optional[float] = 1.0
    """Largest global gradient norm; null for no clipping."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Learning rate after the warm-up; wsd stays at the peak and decays over the last decay_fraction of the steps."""
    warmup: int = 50
    """Steps of linear warm-up."""
    min_lr_ratio: float = 0.05
    """The learning rate ends at this share of its peak."""
    decay_fraction: float = 0.2
    """Share of the steps in which wsd decays."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 300
    """Steps between two checkpoints; one more at the end. 0: only at the end."""
    keep: int = 2
    """Complete checkpoints that are kept."""


@dataclass(frozen=True)
class TrackingConfig:
    trackers: list[str] = field(default_factory=list)
    """Any of wandb, tensorboard; metrics.jsonl is always written."""
    project: str = "dmoe"
    """Project name given to the trackers."""
    wandb_mode: Literal["online", "offline", "disabled"] = "offline"
    """Whether wandb talks to its server."""


@dataclass(frozen=True)
class DebugConfig:
    collectives: bool = False
    """Before each token exchange the ranks compare operation, shapes and splits, and name who does not fit. Several times slower."""


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
