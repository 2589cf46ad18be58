"""What a trainer does about modules: once, when the model is built and the run is open; and once at the end.

What sets of modules make of each domain, together and alone: also sets that were never trained together (modular.compositions).

Losses and counts of the modules, in the output of the model they are on.

Mixture layers return theirs; a module's layer is called by a hook, whose place in the network has nowhere to hand them on. So a hook on
the whole model collects them at the end of a forward in training, before DDP or FSDP2 look at its output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
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
from dmoe.modular.attach import CHILD
from dmoe.modular.routing.tables import TableRouter
from dmoe.train.engine import Engine
from dmoe.train.evaluation import evaluate
from dmoe.train.modular.attach import freezes_base_model
from dmoe.train.modular.base_model import find_base_model, load_base_model
from dmoe.train.modular.stages import BASE_MODEL_DIR, is_config_file
from dmoe.train.tasks import Data


class ModularSession:
    """Made after the run's own checkpoint was taken up, if there is one: `fresh` says that there is none. Collective.

    Raises: ConfigError and CheckpointError for a core that cannot be taken.
    """

    def __init__(self, engine: Engine, run: Path, *, fresh: bool) -> None:
        self.engine, core = engine, engine.config.modular.core
        if fresh and core is not None:
            load_base_model(engine, find_base_model(str(run / BASE_MODEL_DIR) if is_config_file(core) else core, engine))
        self.proof = FrozenProof(engine)
        if self.proof.module is not None:
            optimizer = getattr(
                engine.optimizer, "optimizer", engine.optimizer
            )  # accelerate's has no hooks
            freeze_all_but(engine.model, self.proof.module, optimizer)

    def num_trained(self, parameters: int) -> int:
        """Of so many parameters that are not frozen, those that training changes: under one_module these are the banks, of which one
        module in M moves."""
        return (
            parameters
            if self.proof.module is None
            else parameters // self.engine.config.modular.modules
        )

    def evaluate_compositions(self, data: Data, stop: Callable[[], bool]) -> list[dict[str, Any]] | None:
        """Evaluations with each of `modular.compositions`; None if some rank was told to stop. Collective."""
        return evaluate_compositions(self.engine, data, stop)

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


def evaluate_compositions(
    engine: Engine, data: Data, stop: Callable[[], bool]
) -> list[dict[str, Any]] | None:
    """An evaluation for each set: its modules, and what `by_domain` of an `eval` line says. Collective.

    None if some rank was told to `stop` on the way.
    """
    found = []
    for modules in engine.config.modular.compositions:
        with fixed_table_row(engine.model, modules):
            result = evaluate(engine, data, stop)
        if result is None:
            return None
        alone = {data.domains[0]: {"loss": result.loss, **result.measures, "tokens": result.tokens}}
        found.append({"modules": modules, "by_domain": result.by_domain or alone})
    return found


@contextmanager
def fixed_table_row(model: nn.Module, modules: Sequence[int]) -> Iterator[None]:
    """Every domain visits these modules, whatever the table says."""
    routers = [
        layer.router for layer in adapter_layers(model).values() if isinstance(layer.router, TableRouter)
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


class FrozenProof:
    """Made when the weights are there. All methods are collective."""

    def __init__(self, engine: Engine) -> None:
        self.engine, modular = engine, engine.config.modular
        self.module: int | None = None
        """The one that is trained, where it is one."""
        if modular.bank != "none" and modular.train == "one_module":
            self.module = modular.modules - 1 if modular.module is None else modular.module
        self.hashes = self._hashes()

    def finish(self) -> dict[str, bool]:
        """`core_unchanged` and `others_unchanged`, where they are frozen. Raises NumbersError where they are not what they were."""
        after = self._hashes()
        for name, before in self.hashes.items():
            if after[name] != before:
                raise NumbersError(
                    f"{WORDS[name]} frozen, and has changed: do not use this run, and report it"
                )
        return {f"{name}_unchanged": True for name in self.hashes}

    def _hashes(self) -> dict[str, str]:
        found = {}
        if freezes_base_model(self.engine.config):
            found["core"] = self._digest(self._core())
            if self.module is not None or self.engine.config.modular.train == "router":
                found["others"] = self._digest(self._others())
        return found

    def _core(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.engine.model.state_dict().items():
            if CHILD not in name.split("."):
                yield name, value

    def _others(self) -> Iterator[tuple[str, Tensor]]:
        """All modules but the one that is trained; and routers and aggregations, where one is."""
        for place, layer in adapter_layers(self.engine.model).items():
            bank = layer.experts
            for name, stack in bank.stacked_tensors().items():
                others_e = (
                    torch.arange(bank.local_modules, device=stack.device) + bank.first
                    != self.module
                )
                yield (
                    f"{place}.{name}",
                    local_tensor(stack)[others_e] if self.module is not None else stack,
                )
            if self.module is not None:
                for part in (layer.router, layer.aggregation):
                    yield from (
                        (f"{place}.{name}", value) for name, value in part.state_dict().items()
                    )

    def _digest(self, state: Iterator[tuple[str, Tensor]]) -> str:
        digest = hashlib.sha256()
        for name, value in state:
            mine = local_tensor(value).cpu().contiguous()
            digest.update(f"{name}\0{mine.dtype}\0{tuple(mine.shape)}\0".encode())
            digest.update(mine.flatten().view(torch.uint8).numpy().data)
        row = torch.tensor(list(digest.digest()), dtype=torch.uint8)
        every = RankGroup(self.engine.mesh.control_group).gather(row)
        return hashlib.sha256(bytes(every.flatten().tolist())).hexdigest()


WORDS = {"core": "the core was", "others": "what is not trained of the modules was"}
