"""Modules on the network: what they compute, where they stand, who visits them, what of all this is trained.

The four dimensions of Pfeiffer et al. (2023, Modular Deep Learning); docs/modular.md has an example of each choice.

Letters: M modules of a bank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional

# OmegaConf reads these annotations at run time and knows Optional, not the `X | Y` of strings: hence typing's names.


@dataclass(frozen=True)
class ModularConfig:
    bank: Literal["none", "low_rank", "adapter", "prompt", "prefix", "scale", "sparse_delta"] = (
        "none"
    )
    """What a module computes; one file each in dmoe/modular/banks. none: the network has no modules."""
    at: Optional[str] = None
    """Shell-like pattern of the submodules they stand beside. Default: *.attention.w_* (low_rank, sparse_delta), *.feed_forward
    (adapter, scale), embedding (prompt), *.attention.w_qkv (prefix)."""
    modules: int = 1
    """Modules M of each bank, over all ranks. More than the core has: the others are new."""
    rank: int = 8
    """low_rank: rank of the product."""
    alpha: Optional[float] = None
    """low_rank: the product is scaled by alpha / rank. Default: rank, so that the scale is 1."""
    hidden: int = 16
    """adapter: width of the bottleneck."""
    reads: Literal["output", "input"] = "output"
    """adapter: output stands after the frozen module, input beside it."""
    length: int = 8
    """prompt, prefix: positions in front of each sequence."""
    density: float = 0.01
    """sparse_delta: share of a matrix's numbers that a module changes."""
    routing: Literal["constant", "table", "fixed", "top_k", "noisy", "soft", "adaptive"] = (
        "constant"
    )
    """Who visits which modules: the same weights for all (constant), by the sequence's domain (table, fixed), or learned."""
    top_k: int = 1
    """Modules a token goes to; adaptive: at most. constant, table and soft say it themselves."""
    per: Literal["token", "sequence", "task"] = "token"
    """What a learned router is asked about: each token, the start of its sequence, or the sequence's domain."""
    first: Optional[int] = 1
    """per=sequence: the router sees the mean of so many first tokens; null: of all, which a causal model must not."""
    labels: Optional[int] = None
    """per=task: number of domains."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """What turns a learned router's logits into scores; only routing=top_k reads it."""
    renormalize: Optional[bool] = None
    """Divide the chosen weights by their sum. Default: for top_k and noisy with more than one choice."""
    top_p: float = 0.6
    """adaptive: a token takes modules until their probabilities sum to this."""
    table: list[list[int]] = field(default_factory=list)
    """table: the modules of each domain, in the order of the data's domains, e.g. [[0], [1], [0, 1]]."""
    compositions: list[list[int]] = field(default_factory=list)
    """table: sets of modules, e.g. [[], [0], [0, 1]], with each of which every domain is evaluated once more at the end of the run."""
    weights: list[float] = field(default_factory=list)
    """constant: the weight of each module. Default: 1/M each."""
    aggregation: Literal[
        "weighted_sum", "mean", "concat", "attention", "gated", "parameter_mean", "stacked"
    ] = "weighted_sum"
    """How the chosen modules' outputs become one; one file each in dmoe/modular/aggregation."""
    train: Literal["joint", "modules", "one_module", "router"] = "modules"
    """joint trains everything; modules freezes the core; one_module trains one module of every bank and nothing else; router trains
    routers and aggregations over frozen modules."""
    module: Optional[int] = None
    """one_module: which one. Default: the last."""
    core: Optional[str] = None
    """What the weights start from: a run, a checkpoint, or a config file, which is trained first, into RUN/core. Also without a bank.
    Default: the seed."""
