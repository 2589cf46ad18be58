"""Routing to modules: fixed or learned, discrete or soft, per token, sequence or task.

Learned routers are those of `dmoe.moe.routers`. This package adds fixed routing (tables, constant
weights) and wrappers that route per sequence or per task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dmoe.config.errors import ConfigError
from dmoe.config.schema import RouterConfig
from dmoe.modular.routing.learned import PerSequence, PerTask
from dmoe.modular.routing.tables import ConstantRouter, TableRouter
from dmoe.moe import routers
from dmoe.moe.routers.base import RouterModule

__all__ = [
    "ConstantRouter",
    "PerSequence",
    "PerTask",
    "RouterMaker",
    "TableRouter",
    "constant",
    "routed",
    "table",
]

RouterMaker = Callable[[int, int], RouterModule]
"""(input width, layer index) -> router of one target module."""


def constant(*weights: float) -> RouterMaker:
    """Route every token to all modules with these weights; `constant(1.0)` for a single module."""
    return lambda width, layer: ConstantRouter(weights, layer)


def table(rows: Sequence[Sequence[int]], num_modules: int, *, weight: float = 1.0) -> RouterMaker:
    """Route each token to the modules of its label; see `TableRouter`."""
    return lambda width, layer: TableRouter(rows, num_modules, weight=weight, layer=layer)


def routed(
    kind: str,
    num_modules: int,
    top_k: int = 1,
    *,
    per: str = "token",
    first: int | None = None,
    labels: int | None = None,
    **options: Any,
) -> RouterMaker:
    """Route by a router of `dmoe.moe.routers`.

    Args:
        kind: `RouterConfig.kind`: top_k, soft (needs top_k = num_modules), adaptive, fixed, ...
        num_modules: M.
        top_k: modules per token.
        per: `token`, `sequence` (from the mean of its tokens) or `task` (from the label).
        first: for `per=sequence`: number of tokens that are averaged. None: all.
        labels: for `per=task`: number of labels.
        options: other fields of `RouterConfig`, e.g. `score="sigmoid", renormalize=False` for
            weights that are not normalized.

    Raises:
        ConfigError: for settings without meaning.
    """
    if per not in ("token", "sequence", "task"):
        raise ConfigError("per", per, "must be token, sequence or task", "use token")
    if (labels is None) == (per == "task"):
        raise ConfigError(
            "labels",
            labels,
            "is the number of tasks, for per=task and nothing else",
            "give it with per=task only",
        )
    if first is not None and per != "sequence":
        raise ConfigError("first", first, "is for per=sequence only", "leave it out")
    config = RouterConfig(kind=kind, **options)

    def make(width: int, layer: int) -> RouterModule:
        router = routers.build_router(
            config, width if labels is None else labels, num_modules, top_k, layer
        )
        if labels is not None:
            return PerTask(router, labels)
        return PerSequence(router, first=first) if per == "sequence" else router

    return make
