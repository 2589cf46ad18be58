"""Who visits which module: fixed or learned, hard or soft, by token, by sequence or by task.

Learned routers are those of `dmoe.moe.routers`; here are only the tables, and the wrappers that ask a router about a sequence or a
task. A `RouterMaker` makes the router of one place, for the width its modules read and the index of the layer.
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
"""(width, layer) -> router."""


def constant(*weights: float) -> RouterMaker:
    """The same weights for every token, one for each module; `constant(1.0)` for one module alone."""
    return lambda width, layer: ConstantRouter(weights, layer)


def table(rows: Sequence[Sequence[int]], num_modules: int, *, weight: float = 1.0) -> RouterMaker:
    """The modules of each label, in order."""
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
    """A router of `dmoe.moe.routers`, by its kind, and what it is asked about.

    Args:
        kind: `RouterConfig.kind`: top_k, soft (needs top_k = num_modules), adaptive, fixed, ...
        per: `token`; `sequence`, by the mean of its tokens, of the `first` ones if that is given; `task`, by the label, of which there
            are `labels`.
        options: the other fields of `RouterConfig`. Scores that are not normalised are `score="sigmoid", renormalize=False`.

    Raises: ConfigError for settings that mean nothing.
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
    config = RouterConfig(kind=kind, **options)  # type: ignore[arg-type]

    def make(width: int, layer: int) -> RouterModule:
        router = routers.build(
            config, width if labels is None else labels, num_modules, top_k, layer
        )
        if labels is not None:
            return PerTask(router, labels)
        return PerSequence(router, first=first) if per == "sequence" else router

    return make
