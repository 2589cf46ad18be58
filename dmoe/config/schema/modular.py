"""Modules (adapters) on a base model: what they compute, where, how they are routed and trained.

The four dimensions of Pfeiffer et al. (2023, Modular Deep Learning); docs/modular.md has an example
of each choice.

Letters: M modules of a bank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, Optional

from dmoe.config.schema.constraints import above, fraction, from_to, only_for

# OmegaConf evaluates these annotations and accepts Optional and Union, not `X | Y`.

MOST = 1 << 20


@dataclass(frozen=True)
class ModularConfig:
    bank: Literal["none", "low_rank", "adapter", "prompt", "prefix", "scale", "sparse_delta"] = (
        "none"
    )
    """Function that a module computes; implemented in dmoe/modular/banks. none: no modules."""
    at: Optional[str] = None
    """Shell-like pattern of the target submodules. Default: *.attention.w_* (low_rank,
    sparse_delta), *.feed_forward (adapter, scale), embedding (prompt), *.attention.w_qkv
    (prefix)."""
    modules: Annotated[int, from_to(1, MOST)] = 1
    """Modules M per bank, over all ranks. If the base model has fewer, the others are new."""
    rank: Annotated[int, only_for("modular.bank", "low_rank"), from_to(1, MOST)] = 8
    """low_rank: rank of the product."""
    alpha: Annotated[
        Optional[float], only_for("modular.bank", "low_rank"), above(0, fix="leave it out")
    ] = None
    """low_rank: the product is scaled by alpha / rank. Default: rank, so that the scale is 1."""
    hidden: Annotated[int, only_for("modular.bank", "adapter"), from_to(1, MOST)] = 16
    """adapter: width of the bottleneck."""
    reads: Annotated[Literal["output", "input"], only_for("modular.bank", "adapter")] = "output"
    """adapter: output: it reads the output of the frozen submodule; input: it reads the submodule's
    input, in parallel to it."""
    length: Annotated[int, only_for("modular.bank", "prompt", "prefix"), from_to(1, MOST)] = 8
    """prompt, prefix: positions in front of each sequence."""
    density: Annotated[
        float, only_for("modular.bank", "sparse_delta"), fraction("(]", fix="use 0.01")
    ] = 0.01
    """sparse_delta: share of a matrix's elements that a module changes."""
    routing: Literal["constant", "table", "fixed", "top_k", "noisy", "soft", "adaptive"] = (
        "constant"
    )
    """Modules that a token uses: all with constant weights (constant), by the domain of its
    sequence (table, fixed), or learned (the others)."""
    top_k: Annotated[
        int, only_for("modular.routing", "top_k", "noisy", "adaptive", "fixed"), from_to(1, MOST)
    ] = 1
    """Modules per token; adaptive: the maximum. constant, table and soft define it themselves."""
    per: Annotated[
        Literal["token", "sequence", "task"],
        only_for("modular.routing", "top_k", "noisy", "soft", "adaptive"),
    ] = "token"
    """Input of a learned router: each token, the start of its sequence, or the sequence's
    domain."""
    first: Annotated[Optional[int], only_for("modular.per", "sequence"), from_to(1, MOST)] = 1
    """per=sequence: the router reads the mean of this many first tokens; null: of all, which a
    causal model must not do."""
    labels: Annotated[Optional[int], only_for("modular.per", "task"), from_to(1, MOST)] = None
    """per=task: number of domains."""
    score: Annotated[Literal["softmax", "sigmoid"], only_for("modular.routing", "top_k")] = (
        "softmax"
    )
    """top_k: a learned router's logits to scores."""
    renormalize: Annotated[
        Optional[bool], only_for("modular.routing", "top_k", "noisy", "adaptive")
    ] = None
    """Divide the chosen weights by their sum. Default: for top_k and noisy with more than one
    module per token."""
    top_p: Annotated[float, only_for("modular.routing", "adaptive")] = 0.6
    """adaptive: a token takes modules until their probabilities sum to this."""
    table: Annotated[list[list[int]], only_for("modular.routing", "table")] = field(
        default_factory=list
    )
    """table: the modules of each domain, in the order of the data's domains, e.g.
    [[0], [1], [0, 1]]."""
    compositions: Annotated[list[list[int]], only_for("modular.routing", "table")] = field(
        default_factory=list
    )
    """table: sets of modules, e.g. [[], [0], [0, 1]]. At the end of the run every domain is
    evaluated with each of them."""
    weights: Annotated[list[float], only_for("modular.routing", "constant")] = field(
        default_factory=list
    )
    """constant: the weight of each module. Default: 1/M each."""
    aggregation: Literal[
        "weighted_sum", "mean", "concat", "attention", "gated", "parameter_mean", "stacked"
    ] = "weighted_sum"
    """Combination of the outputs of the chosen modules; implemented in dmoe/modular/aggregation."""
    train: Literal["joint", "modules", "one_module", "router"] = "modules"
    """joint trains everything; modules freezes the base model; one_module trains one module of
    every bank and nothing else; router trains routers and aggregations over frozen modules."""
    module: Annotated[Optional[int], only_for("modular.train", "one_module")] = None
    """one_module: index of the module to train. Default: the last."""
    core: Optional[str] = None
    """The base model whose weights are loaded: a run, a checkpoint, or a config file, which is
    trained first, into RUN/core. Also without a bank. Default: weights initialized from the
    seed."""
