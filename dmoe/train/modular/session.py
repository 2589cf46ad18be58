"""The trainer's part in adapter modules: base model, compositions, proof of freezing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.checkpoint.consensus import RankGroup
from dmoe.config.errors import ConfigError, NumbersError
from dmoe.config.schema import Config
from dmoe.distributed.gradients import local_tensor
from dmoe.modular import adapter_layers, freeze_all_but
from dmoe.modular.base_model import base_model_state, hash_tensors
from dmoe.modular.routing.tables import TableRouter
from dmoe.train.engine import Engine
from dmoe.train.evaluation import evaluate
from dmoe.train.modular.attach import freezes_base_model
from dmoe.train.modular.base_model import find_base_model, load_base_model
from dmoe.train.modular.stages import BASE_MODEL_DIR, is_config_file
from dmoe.train.tasks import DataSplits


class ModularSession:
    """The adapter modules of one run, from the loaded weights to the end."""

    def __init__(self, engine: Engine, run: Path, *, fresh: bool) -> None:
        """Load the base model and freeze what is not trained. Collective.

        Args:
            engine: with the weights of the run's own checkpoint, if there is one.
            run: the run directory.
            fresh: True if the run has no checkpoint, so that it starts from `modular.core`.

        Raises:
            ConfigError, CheckpointError: for a base model that cannot be loaded.
        """
        self.engine, path = engine, engine.config.modular.core
        if fresh and path is not None:
            source = str(run / BASE_MODEL_DIR) if is_config_file(path) else path
            load_base_model(engine, find_base_model(source, engine))
        self.proof = FrozenProof(engine)
        if self.proof.module is not None:
            # accelerate's wrapper has no hooks
            optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
            freeze_all_but(engine.model, self.proof.module, optimizer)

    def num_trained(self, parameters: int) -> int:
        """Return how many of the parameters that require gradients training changes.

        Under `one_module` these are the banks' parameters, of which one module in M changes.
        """
        if self.proof.module is None:
            return parameters
        return parameters // self.engine.config.modular.modules

    def evaluate_compositions(
        self, data: DataSplits, stop: Callable[[], bool]
    ) -> list[dict[str, Any]]:
        """Evaluate with each set of `modular.compositions`. Collective. Raises StopRequested."""
        return evaluate_compositions(self.engine, data, stop)

    def finish(self) -> tuple[dict[str, bool], str | None]:
        """Check that frozen parameters did not change. Collective.

        Returns the fields of the `end` line, and the result in words. Raises NumbersError.
        """
        unchanged = self.proof.finish()
        words = " and ".join(FROZEN_PARTS[name.removesuffix("_unchanged")] for name in unchanged)
        return unchanged, f"unchanged by hash: {words}" if unchanged else None


def check_domains(config: Config, domains: Sequence[str]) -> None:
    """Raise ConfigError for a table or per-task router with fewer labels than there are domains."""
    modular, count = config.modular, max(1, len(domains))
    if modular.routing == "table" and len(modular.table) < count:
        rows = len(modular.table)
        missing = domains[rows] if domains else 0
        allowed = f"has {rows} rows, and none for domain {rows} ({missing}) of {count}"
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


def evaluate_compositions(
    engine: Engine, data: DataSplits, stop: Callable[[], bool]
) -> list[dict[str, Any]]:
    """Evaluate with each set of `modular.compositions`. Collective.

    Returns the `compositions` of an `eval` line: for each set its modules, and `by_domain`. Raises
    StopRequested if `stop()` is true on any rank.
    """
    results = []
    for modules in engine.config.modular.compositions:
        with fixed_table_row(engine.model, modules):
            result = evaluate(engine, data, stop)
        alone = {data.domains[0]: {"loss": result.loss, **result.metrics, "tokens": result.targets}}
        results.append({"modules": modules, "by_domain": result.by_domain or alone})
    return results


@contextmanager
def fixed_table_row(model: nn.Module, modules: Sequence[int]) -> Iterator[None]:
    """Route every domain to these modules, instead of by the table."""
    routers = [
        layer.router
        for layer in adapter_layers(model).values()
        if isinstance(layer.router, TableRouter)
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


FROZEN_PARTS = {"core": "the base model", "others": "the modules that are not trained"}
"""Frozen parts by their name in the `end` line, in words."""


class FrozenProof:
    """Proves by hash that frozen parameters did not change, from the loaded weights to the end.

    Each rank hashes its shards, and the ranks' hashes are hashed in rank order. So a hash is
    comparable only at the same topology; `base_model_hash` is the one of a whole base model. All
    methods are collective. Cost: every byte is read, about a second per GB.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, modular = engine, engine.config.modular
        self.module: int | None = None
        """The module that is trained alone (`modular.train=one_module`)."""
        if modular.bank != "none" and modular.train == "one_module":
            self.module = modular.modules - 1 if modular.module is None else modular.module
        self.hashes = self._hashes()

    def finish(self) -> dict[str, bool]:
        """Return `core_unchanged` and `others_unchanged` for what is frozen.

        Raises: NumbersError if a hash has changed.
        """
        after = self._hashes()
        for name, before in self.hashes.items():
            if after[name] != before:
                raise NumbersError(
                    f"frozen parameters have changed ({FROZEN_PARTS[name]}): "
                    "do not use this run, and report it"
                )
        return {f"{name}_unchanged": True for name in self.hashes}

    def _hashes(self) -> dict[str, str]:
        hashes = {}
        if freezes_base_model(self.engine.config):
            hashes["core"] = self._hash(base_model_state(self.engine.model).items())
            if self.module is not None or self.engine.config.modular.train == "router":
                hashes["others"] = self._hash(self._frozen_modules())
        return hashes

    def _frozen_modules(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all modules except the trained one; with one, routers and aggregations too."""
        for target, layer in adapter_layers(self.engine.model).items():
            bank = layer.experts
            for name, value in bank.stacked_tensors().items():
                if self.module is None:
                    yield f"{target}.{name}", value
                else:
                    module_e = torch.arange(bank.local_modules, device=value.device) + bank.first
                    yield f"{target}.{name}", local_tensor(value)[module_e != self.module]
            if self.module is not None:
                for part in (layer.router, layer.aggregation):
                    for name, value in part.state_dict().items():
                        yield f"{target}.{name}", value

    def _hash(self, tensors: Iterable[tuple[str, Tensor]]) -> str:
        own = hash_tensors((name, local_tensor(value)) for name, value in tensors)
        row = torch.tensor(list(own), dtype=torch.uint8)
        all_ranks = RankGroup(self.engine.mesh.control_group).gather(row)
        return hashlib.sha256(bytes(all_ranks.flatten().tolist())).hexdigest()
