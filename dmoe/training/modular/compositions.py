"""What sets of modules make of each domain, together and alone: also sets that were never trained together (modular.compositions)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from dmoe.modular import layers
from dmoe.modular.routing.tables import TableRouter
from dmoe.training.engine import Engine
from dmoe.training.evaluation import evaluate
from dmoe.training.tasks import Data

__all__ = ["compositions"]


def compositions(engine: Engine, data: Data, stop: Callable[[], bool]) -> list[dict[str, Any]] | None:
    """An evaluation for each set: its modules, and what `by_domain` of an `eval` line says. Collective.

    None if some rank was told to `stop` on the way.
    """
    found = []
    for modules in engine.config.modular.compositions:
        with every_row(engine.model, modules):
            result = evaluate(engine, data, stop)
        if result is None:
            return None
        alone = {data.domains[0]: {"loss": result.loss, **result.measures, "tokens": result.tokens}}
        found.append({"modules": modules, "by_domain": result.by_domain or alone})
    return found


@contextmanager
def every_row(model: nn.Module, modules: Sequence[int]) -> Iterator[None]:
    """Every domain visits these modules, whatever the table says."""
    routers = [layer.router for layer in layers(model).values() if isinstance(layer.router, TableRouter)]
    before = [router.module_LK.clone() for router in routers]
    try:
        for router in routers:
            row = [*modules, *[-1] * (router.top_k - len(modules))]
            router.module_LK.copy_(router.module_LK.new_tensor(row).expand_as(router.module_LK))
        yield
    finally:
        for router, rows in zip(routers, before, strict=True):
            router.module_LK.copy_(rows)
