"""What is trained: the network and its mixture-of-experts layers.

Letters: T tokens, D model width, F expert hidden width, E experts, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional

# OmegaConf reads these annotations at run time and knows Optional and Union, not the `X | Y` of strings: hence typing's names.


@dataclass(frozen=True)
class ModelConfig:
    dim: int = 128
    """Width D of the residual stream."""
    layers: int = 3
    """Number of transformer blocks; of residual feed-forwards for train.task=classification, where it may be 0."""
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
    fusion: Literal["concat", "gated"] = "concat"
    """classification: streams stand side by side, or each has an encoder of its own (the experts of one layer, moe.router.kind=fixed)
    and a gate joins them."""
    head: Literal["linear", "experts"] = "linear"
    """classification: the logits are a linear map, or what a layer of experts makes of its input, whose width may differ."""
    stream_dropout: float = 0.0
    """classification: share of the samples of which, in training, one stream is missing; a sample never loses its last one."""


@dataclass(frozen=True)
class RouterConfig:
    kind: Literal[
        "top_k",
        "noisy",
        "group_limited",
        "adaptive",
        "fixed",
        "hash",
        "soft",
        "expert_choice",
        "budget",
    ] = "top_k"
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
    min_weight: float = 0.1
    """budget: an expert is taken only if its weight is above this."""
    budget: float = 1.0
    """budget: multiply-adds a token may spend, as a share of those of all experts together; 1.0 lets everything run. A call may give
    another: `layer(x, compute_budget=0.5)`."""
    per: Literal["token", "sequence"] = "token"
    """budget: the gating network reads each token, or the mean over its sequence, whose tokens then all go the same way."""
    allow_future_leak: bool = False
    """expert_choice, and budget with per=sequence: accept that the choice for a token looks at later ones of its sequence, which a
    causal model must not."""


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
    shapes: list[list[int]] = field(default_factory=list)
    """Hidden widths of each expert, e.g. [[], [50], [64, 32]]; [] is one linear map. Default: all have one of expert_dim."""
    zero: int = 0
    """Zero-cost experts that return 0 (MoE++). They are chosen like any other, and computed where the token is."""
    copy: int = 0
    """Zero-cost experts that return their input."""
    constant: int = 0
    """Zero-cost experts that return a trainable vector, whatever their input."""


@dataclass(frozen=True)
class MoEConfig:
    num_experts: int = 8
    """Routed experts E of one layer, over all ranks; those of zero cost are counted apart."""
    top_k: int = 2
    """Experts a token goes to; adaptive and budget: at most."""
    expert_dim: int = 192
    """Hidden width F of one expert, where experts.shapes does not say."""
    exchange: Literal["packed", "padded"] = "packed"
    """The all-to-all: packed sends exactly the rows there are (one host sync); padded sends fixed slots (none, needs a capacity)."""
    router: RouterConfig = field(default_factory=RouterConfig)
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
