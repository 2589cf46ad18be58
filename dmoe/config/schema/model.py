"""The network and its mixture-of-experts layers.

Letters: T tokens, D model width, F expert hidden width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Optional

from dmoe.config.schema.constraints import above, at_least, at_most, fraction, one_of, only_for

# OmegaConf evaluates these annotations and accepts Optional and Union, not `X | Y`.


@dataclass(frozen=True)
class LoraConfig:
    rank: Annotated[int, at_least(0)] = 0
    """Train a published model (model.source) by low-rank factors of this rank, and freeze all else
    (docs/hf.md); 0: train the weights themselves."""
    alpha: Annotated[Optional[float], above(0)] = None
    """The product of the factors is scaled by alpha / rank. Default: 2 * rank."""
    targets: list[str] = field(default_factory=list)
    """Ends of the names of linear layers that get factors; experts: the weights of all experts.
    Empty: q_proj, k_proj, v_proj, o_proj and experts, those of them that the model has."""


@dataclass(frozen=True)
class ModelConfig:
    source: Annotated[Optional[str], only_for("train.task", "language_modelling")] = None
    """Train a published mixture of the transformers library in place of dmoe's own network: its
    directory, or its name on the Hugging Face hub. dim, layers, heads, moe.num_experts, moe.top_k,
    moe.expert_dim and, by default, data.tokenizer then come from it (docs/models.md)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    dim: Annotated[int, at_least(1), at_most(1 << 20)] = 128
    """Width D of the residual stream."""
    layers: Annotated[int, at_least(0), at_most(10_000)] = 3
    """Number of transformer blocks. For train.task=classification: number of residual feed-forward
    blocks, 0 or more."""
    heads: Annotated[int, at_least(1), at_most(1 << 16)] = 4
    """Query heads of attention."""
    kv_heads: Annotated[
        Optional[int], only_for("train.task", "language_modelling"), above(0), at_most(1 << 16)
    ] = None
    """Key/value heads (grouped-query attention); must divide heads. Default: as many as heads."""
    head_dim: Annotated[
        Optional[int], only_for("train.task", "language_modelling"), above(0), at_most(1 << 16)
    ] = None
    """Width of one head. Default: dim / heads."""
    dense_dim: Annotated[Optional[int], above(0), at_most(1 << 24)] = None
    """Hidden width of a dense feed-forward. Default: the active width of a MoE layer, so that both
    have the same cost per token."""
    moe_every: Annotated[int, at_least(0)] = 1
    """Every n-th block has a MoE layer, the others a dense feed-forward; 0: all blocks are
    dense."""
    dense_first: Annotated[int, at_least(0)] = 0
    """The first n blocks are dense, whatever moe_every is (DeepSeekMoE: 1)."""
    qk_norm: Annotated[bool, only_for("train.task", "language_modelling")] = True
    """RMSNorm on queries and keys, per head (Qwen3): keeps attention logits small."""
    tie_embeddings: Annotated[bool, only_for("train.task", "language_modelling")] = True
    """Use the token embedding as the output projection too."""
    rope_base: Annotated[float, only_for("train.task", "language_modelling"), above(0)] = 10000.0
    """Base of the rotary position frequencies."""
    norm_eps: Annotated[float, above(0)] = 1e-5
    """Epsilon of every RMSNorm."""
    init_std: Annotated[float, above(0)] = 0.02
    """Standard deviation of the normal initialization; output projections are divided by
    sqrt(2 * layers) (GPT-2)."""
    fusion: Annotated[Literal["concat", "gated"], only_for("train.task", "classification")] = (
        "concat"
    )
    """classification: concat concatenates the streams; gated gives each stream its own encoder (the
    experts of one layer, moe.router.kind=fixed) and sums their outputs with a gate."""
    head: Annotated[Literal["linear", "experts"], only_for("train.task", "classification")] = (
        "linear"
    )
    """classification: the logits are the output of a linear layer, or of a MoE layer whose output
    width may differ from its input width."""
    stream_dropout: Annotated[
        float, only_for("train.task", "classification"), fraction(fix="use 0.3")
    ] = 0.0
    """classification: share of the training samples that lose one stream; the last stream of a
    sample is never dropped."""


@dataclass(frozen=True)
class RouterConfig:
    """The fields that only some kinds read are listed in `dmoe/config/router_kinds.py`."""

    kind: Annotated[
        str,
        one_of(
            "top_k",
            "noisy",
            "group_limited",
            "adaptive",
            "fixed",
            "hash",
            "soft",
            "expert_choice",
            "budget",
            "workload",
        ),
    ] = "top_k"
    """Rule by which a token's experts are chosen; implemented in dmoe/moe/routers, or by a class of
    your own (docs/plugins.md)."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Logits to scores: softmax (Switch, Mixtral, OLMoE, Qwen) or sigmoid (DeepSeek-V3)."""
    weights_from: Literal["all", "chosen"] = "all"
    """Softmax over all E experts, or over the K chosen ones only."""
    renormalize: bool = True
    """Divide the chosen weights by their sum. Refused for top_k=1: every weight would be 1 and the
    router would have no gradient."""
    scale: Annotated[float, above(0)] = 1.0
    """Factor on the weights, after renormalization (DeepSeek's routed_scaling_factor)."""
    jitter: Annotated[float, fraction("[)", fix="Switch used 0.01")] = 0.0
    """In training, multiply the router's input by uniform noise in [1 - jitter, 1 + jitter]
    (Switch)."""
    groups: Annotated[int, at_least(1)] = 1
    """group_limited: number of groups of consecutive experts (DeepSeek-V3's n_group)."""
    topk_groups: Annotated[int, at_least(1)] = 1
    """group_limited: number of best groups from which a token's experts are chosen."""
    top_p: Annotated[float, fraction("(]", fix="use 0.6")] = 0.6
    """adaptive: a token takes experts until their probabilities sum to this."""
    k_min: Annotated[int, at_least(1)] = 1
    """adaptive: minimum number of experts per token; the maximum is moe.top_k."""
    min_weight: Annotated[float, fraction("[)", fix="use 0.1")] = 0.1
    """budget: an expert is taken only if its weight is above this."""
    budget: Annotated[float, fraction("(]", fix="use 1.0 for no limit")] = 1.0
    """budget: multiply-adds that a token may use, as a share of those of all experts; 1.0: no
    limit. A call may set another one: `layer(x, compute_budget=0.5)`."""
    per: Literal["token", "sequence"] = "token"
    """budget: the router reads each token, or the mean over its sequence; then all tokens of a
    sequence have the same experts."""
    allow_future_leak: bool = False
    """expert_choice, and budget with per=sequence: accept that the choice for a token depends on
    later tokens of its sequence, which a causal model must not do."""
    workload: Literal["W0", "W1", "W2", "W3", "W4", "W5", "W6", "W7"] = "W0"
    """workload: W0 balanced, W1 hot set, W2 hot rank, W3 spread hot, W4 ragged sources, W5 empty
    rank, W6 rotating hot spot, W7 burst (docs/simulation.md)."""
    ranks: Annotated[int, at_least(2)] = 8
    """workload: number of ranks that W1 to W7 are made for, whatever the run has; a hot set is
    num_experts / ranks experts."""
    hot: Annotated[float, at_least(1)] = 1.6
    """workload: load of a hot expert of W1, W2, W3, W6 and W7, as a multiple of the mean."""
    freeze: bool = False
    """Do not train the weights of the routers: they stay as they were drawn, or loaded."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a router of your own."""


@dataclass(frozen=True)
class CapacityConfig:
    factor: Annotated[Optional[float], above(0)] = None
    """Slots per expert, as a multiple of its fair share K*T/E; null: dropless."""
    eval_factor: Annotated[Optional[float], above(0)] = None
    """The same in evaluation and generation; null (default): dropless."""
    min_capacity: Annotated[int, at_least(1)] = 1
    """Minimum number of slots per expert and capacity group."""
    pool: Annotated[int, at_least(1)] = 1
    """Number P of consecutive experts that share their slots in a group; must divide num_experts.
    An expert that overflows then uses the slots that others of its pool leave empty."""
    pool_floor: Annotated[float, fraction("[]", fix="use 1.0")] = 1.0
    """Share of an expert's own slots that others of its pool cannot take from it; 0: the pool is
    one queue. Needs pool > 1."""
    group: Literal["rank", "sequence", "global"] = "rank"
    """Tokens that share a capacity: a rank's micro-batch (GShard), each sequence, or the global
    micro-batch. The last two drop the same tokens on any number of ranks."""
    priority: Literal["position", "score"] = "position"
    """Order in which slots are filled: all first choices in token order, then all second ones
    (GShard); or by descending router score."""
    renormalize: bool = False
    """Divide the weights of a token's kept experts by their sum (DeepSpeed does so for K >= 2)."""
    overflow: Literal["drop", "next_choice"] = "drop"
    """An assignment without a slot is dropped, or offered once to the token's next eligible
    expert."""


@dataclass(frozen=True)
class BalanceConfig:
    switch: Annotated[float, at_least(0)] = 0.01
    """Coefficient of the Switch load-balancing loss E * sum_e f_e P_e, which is 1 at perfect
    balance for any K; 0: off."""
    switch_level: Literal["sequence", "micro_batch", "global"] = "micro_batch"
    """Tokens over which f_e and P_e are taken. global: f_e over all data-parallel ranks and the
    accumulation steps so far."""
    z: Annotated[float, at_least(0)] = 0.001
    """Coefficient of the router z-loss mean(logsumexp(logits)^2) (ST-MoE), which keeps router
    logits small; 0: off."""
    importance: Annotated[float, at_least(0)] = 0.0
    """Coefficient of the importance loss: the squared coefficient of variation of each expert's
    summed score (Shazeer 2017)."""
    load: Annotated[float, at_least(0)] = 0.0
    """Coefficient of the load loss: the same of the smooth load (Shazeer 2017, appendix A); needs
    the noisy router."""
    usage_std: Annotated[float, at_least(0)] = 0.0
    """Coefficient of the standard deviation of the mean score of each expert."""
    pooled: Annotated[float, at_least(0)] = 0.0
    """Coefficient of the load-balancing loss of transformers: E * sum_e f_e P_e over all layers of
    one rank together, f summing to top_k; for a published model (docs/models.md)."""
    bias: Annotated[float, at_least(0)] = 0.0
    """Update rate u of the bias of loss-free balancing (DeepSeek-V3): after each step
    b_e += u * sign(mean load - load of e); 0: off."""
    recenter: bool = True
    """Subtract the mean of the bias after each update, so that it cannot drift."""
    kind: Optional[str] = None
    """A loss of your own, FILE.py:Name or package.module:Name (docs/plugins.md)."""
    own: Annotated[float, at_least(0)] = 0.0
    """Coefficient of the loss of your own."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a loss of your own."""


@dataclass(frozen=True)
class ExpertsConfig:
    kind: Annotated[str, one_of("swiglu", "geglu", "gelu", "relu")] = "swiglu"
    """Activation of an expert; swiglu and geglu are gated (three matrices), gelu and relu are not
    (two). Experts of your own stand beside dense feed-forwards and shared experts of swiglu."""
    shared: Annotated[int, at_least(0), at_most(1 << 16)] = 0
    """Number of shared experts, which every token uses beside the routed ones (DeepSeekMoE)."""
    shared_dim: Annotated[Optional[int], above(0), at_most(1 << 24)] = None
    """Hidden width of one shared expert. Default: expert_dim."""
    shapes: list[list[int]] = field(default_factory=list)
    """Hidden widths of each expert, e.g. [[], [50], [64, 32]]; [] is one linear layer. Default: one
    hidden layer of expert_dim for all."""
    zero: Annotated[int, at_least(0), at_most(1 << 16)] = 0
    """Number of zero-cost experts that return 0 (MoE++). They are chosen like any other expert, and
    evaluated on the token's rank."""
    copy: Annotated[int, at_least(0), at_most(1 << 16)] = 0
    """Number of zero-cost experts that return their input."""
    constant: Annotated[int, at_least(0), at_most(1 << 16)] = 0
    """Number of zero-cost experts that return a trainable vector, whatever their input."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of experts of your own."""


@dataclass(frozen=True)
class ReplayConfig:
    """Every token's choices in every MoE layer, by (step, sample, position); docs/replay.md."""

    record: Annotated[Optional[str], only_for("train.task", "language_modelling")] = None
    """Directory to write the experts that every token of training has chosen."""
    from_: Annotated[Optional[str], only_for("train.task", "language_modelling")] = None
    """Choices to train with in place of the router's own: a directory that a run has recorded, or
    a .npy or .safetensors file [tokens, layers, K]. The weights are still the router's."""


@dataclass(frozen=True)
class MoEConfig:
    num_experts: Annotated[int, at_least(1), at_most(1 << 20)] = 8
    """Routed experts E of one layer, over all ranks, without zero-cost experts."""
    top_k: Annotated[int, at_least(1)] = 2
    """Experts per token; adaptive and budget: the maximum."""
    expert_dim: Annotated[int, at_least(0), at_most(1 << 24)] = 192
    """Hidden width F of one expert, 1 or more; not read, and may be 0, if experts.shapes is set."""
    exchange: Literal["packed", "padded"] = "packed"
    """The all-to-all: packed sends exactly the assigned rows (one host synchronization); padded
    sends a fixed number of slots (no synchronization, needs a capacity)."""
    kernels: Literal["torch", "triton"] = "torch"
    """Kernels that move rows, and compute activations of uniform experts, on a GPU: torch's, or
    Triton's, one launch in place of up to seven. Triton's are compared with torch's in its
    interpreter, and have not run on a GPU. A CPU evaluates with torch's, and does not train."""
    router: RouterConfig = field(default_factory=RouterConfig)
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
