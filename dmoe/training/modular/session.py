"""What a trainer does about modules: once, when the model is built and the run is open; and once at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dmoe.config.errors import ConfigError
from dmoe.config.schema import Config
from dmoe.modular import train_one
from dmoe.training.engine import Engine
from dmoe.training.modular.compositions import compositions
from dmoe.training.modular.core import find_core, start_from
from dmoe.training.modular.proof import FrozenProof
from dmoe.training.modular.stages import CORE, is_config_file
from dmoe.training.tasks import Data

__all__ = ["Session", "check_domains"]


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
            optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)  # accelerate's has no hooks
            train_one(engine.model, self.proof.module, optimizer)

    def trained(self, parameters: int) -> int:
        """Of so many parameters that are not frozen, those that training changes: under one_module these are the banks, of which one
        module in M moves."""
        return parameters if self.proof.module is None else parameters // self.engine.config.modular.modules

    def compositions(self, data: Data, stop: Callable[[], bool]) -> list[dict[str, Any]] | None:
        """Evaluations with each of `modular.compositions`; None if some rank was told to stop. Collective."""
        return compositions(self.engine, data, stop)

    def finish(self) -> tuple[dict[str, bool], str | None]:
        """For the `end` line, and in words. Collective. Raises NumbersError where something frozen has changed."""
        known = self.proof.finish()
        what = {"core_unchanged": "the core", "others_unchanged": "what is not trained of the modules"}
        words = " and ".join(what[name] for name in known)
        return known, f"unchanged by their hashes: {words}" if known else None


def check_domains(config: Config, domains: Sequence[str]) -> None:
    """Refuse a table or a router by task that does not know all domains of the data. Raises ConfigError."""
    modular, count = config.modular, max(1, len(domains))
    if modular.routing == "table" and len(modular.table) < count:
        missing = domains[len(modular.table)] if domains else 0
        allowed = f"has {len(modular.table)} rows, and none for domain {len(modular.table)} ({missing}) of {count}"
        raise ConfigError("modular.table", modular.table, allowed, f"give {count} rows: {', '.join(domains)}")
    if modular.labels is not None and modular.labels < count:
        raise ConfigError("modular.labels", modular.labels, f"is less than the {count} domains of the data", f"use {count}")
