"""What was frozen is what it was: a hash before the first step of this process, and one after the last.

Each rank hashes what it holds, name by name and byte by byte, and the ranks' hashes are hashed in their order. So it is compared with
itself only, at one topology; `dmoe.modular.core_hash` is the hash of a whole core. Reads every byte: about a second for each GB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from dmoe.config.errors import NumbersError
from dmoe.distributed.checkpoint.agree import RankGroup
from dmoe.distributed.gradients import local
from dmoe.modular import layers
from dmoe.modular.attach import CHILD
from dmoe.training.engine import Engine
from dmoe.training.modular.attaching import frozen_core

__all__ = ["FrozenProof"]


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
                raise NumbersError(f"{WORDS[name]} frozen, and has changed: do not use this run, and report it")
        return {f"{name}_unchanged": True for name in self.hashes}

    def _hashes(self) -> dict[str, str]:
        found = {}
        if frozen_core(self.engine.config):
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
        for place, layer in layers(self.engine.model).items():
            bank = layer.experts
            for name, stack in bank.stacks().items():
                others_e = torch.arange(bank.local_modules, device=stack.device) + bank.first != self.module
                yield f"{place}.{name}", local(stack)[others_e] if self.module is not None else stack
            if self.module is not None:
                for part in (layer.router, layer.aggregation):
                    yield from ((f"{place}.{name}", value) for name, value in part.state_dict().items())

    def _digest(self, state: Iterator[tuple[str, Tensor]]) -> str:
        digest = hashlib.sha256()
        for name, value in state:
            mine = local(value).cpu().contiguous()
            digest.update(f"{name}\0{mine.dtype}\0{tuple(mine.shape)}\0".encode())
            digest.update(mine.flatten().view(torch.uint8).numpy().data)
        row = torch.tensor(list(digest.digest()), dtype=torch.uint8)
        every = RankGroup(self.engine.mesh.control_group).gather(row)
        return hashlib.sha256(bytes(every.flatten().tolist())).hexdigest()


WORDS = {"core": "the core was", "others": "what is not trained of the modules was"}
