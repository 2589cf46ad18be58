"""What a trainer does about modules: once, when the model is built and the run is open; and once at the end.

What sets of modules make of each domain, together and alone: also sets that were never trained together (modular.compositions).

Losses and counts of the modules, in the output of the model they are on.

Mixture layers return theirs; a module's layer is called by a hook, whose place in the network has nowhere to hand them on. So a hook on
the whole model collects them at the end of a forward in training, before DDP or FSDP2 look at its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from dmoe.config.errors import ConfigError
from dmoe.config.schema import Config
from dmoe.modular import layers, train_one
from dmoe.modular.routing.tables import TableRouter
from dmoe.train.engine import Engine
from dmoe.train.evaluation import evaluate
from dmoe.train.modular.base_model import FrozenProof, find_core, start_from
from dmoe.train.modular.stages import CORE, is_config_file
from dmoe.train.tasks import Data


class Session:
    """Made after the run's own checkpoint was taken up, if there is one: `fresh` says that there is none. Collective.

    Raises: ConfigError and CheckpointError for a core that cannot be taken.
    """

    def __init__(self, engine: Engine, run: Path, *, fresh: bool) -> None:
        self.engine, core = engine, engine.config.modular.core
        if fresh and core is not None:
            start_from(engine, find_core(str(run / CORE) if is_config_file(core) else core, engine))
        self.proof = FrozenProof(engine)
        if self.proof.module is not None:
            optimizer = getattr(
                engine.optimizer, "optimizer", engine.optimizer
            )  # accelerate's has no hooks
            train_one(engine.model, self.proof.module, optimizer)

    def trained(self, parameters: int) -> int:
        """Of so many parameters that are not frozen, those that training changes: under one_module these are the banks, of which one
        module in M moves."""
        return (
            parameters
            if self.proof.module is None
            else parameters // self.engine.config.modular.modules
        )

    def compositions(self, data: Data, stop: Callable[[], bool]) -> list[dict[str, Any]] | None:
        """Evaluations with each of `modular.compositions`; None if some rank was told to stop. Collective."""
        return compositions(self.engine, data, stop)

    def finish(self) -> tuple[dict[str, bool], str | None]:
        """For the `end` line, and in words. Collective. Raises NumbersError where something frozen has changed."""
        known = self.proof.finish()
        what = {
            "core_unchanged": "the core",
            "others_unchanged": "what is not trained of the modules",
        }
        words = " and ".join(what[name] for name in known)
        return known, f"unchanged by their hashes: {words}" if known else None


def check_domains(config: Config, domains: Sequence[str]) -> None:
    """Refuse a table or a router by task that does not know all domains of the data. Raises ConfigError."""
    modular, count = config.modular, max(1, len(domains))
    if modular.routing == "table" and len(modular.table) < count:
        missing = domains[len(modular.table)] if domains else 0
        allowed = f"has {len(modular.table)} rows, and none for domain {len(modular.table)} ({missing}) of {count}"
        raise ConfigError(
            "modular.table", modular.table, allowed, f"give {count} rows: {', '.join(domains)}"
        )
    if modular.labels is not None and modular.labels < count:
        raise ConfigError(
            "modular.labels",
            modular.labels,
            f"is less than the {count} domains of the data",
            f"use {count}",
        )


def compositions(
    engine: Engine, data: Data, stop: Callable[[], bool]
) -> list[dict[str, Any]] | None:
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
    routers = [
        layer.router for layer in layers(model).values() if isinstance(layer.router, TableRouter)
    ]
    before = [router.module_LK.clone() for router in routers]
    try:
        for router in routers:
            row = [*modules, *[-1] * (router.top_k - len(modules))]
            router.module_LK.copy_(router.module_LK.new_tensor(row).expand_as(router.module_LK))
        yield
    finally:
        for router, rows in zip(routers, before, strict=True):
            router.module_LK.copy_(rows)
