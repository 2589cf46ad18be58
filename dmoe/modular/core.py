"""The core: everything of a model that is no module. Frozen, and proven to be."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.modular.attach import CHILD, layers
from dmoe.moe.dispatch import PackedLocal
from dmoe.moe.layer import MoE

__all__ = ["TRAIN", "core_hash", "core_state", "freeze", "select"]

TRAIN = ("joint", "modules", "one_module", "router")
"""What is trained (Pfeiffer et al. 2023, section 6): all; modules with routers and aggregations on a frozen core; modules alone, for
one of them at a time (`one_module.train_one`); routers and aggregations over modules that are done."""


def core_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer of the core, by the name it has without modules, sorted; detached, not copied."""
    state = model.state_dict()
    return {name: state[name].detach() for name in sorted(state) if CHILD not in name.split(".")}


def core_hash(model: nn.Module) -> str:
    """SHA-256 over name, dtype, shape and bytes of everything in the core. Equal before `attach`, with modules, and after `detach`.

    Before sharding: a rank's part of a core has another hash. Reads every byte: about a second for each GB.
    Raises: ConfigError for a core whose experts are sharded already.
    """
    for name, module in model.named_modules():
        if isinstance(module, MoE) and not isinstance(module.packed, PackedLocal):
            raise ConfigError("core_hash", name, "holds a part of its experts only", "take the hash before sharding")
    digest = hashlib.sha256()
    for name, value in core_state(model).items():
        assert not value.is_meta, f"{name} has no bytes: it is on the meta device"
        digest.update(f"{name}\0{str(value.dtype).removeprefix('torch.')}\0{tuple(value.shape)}\0".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def freeze(model: nn.Module) -> str:
    """Train no part of the core; returns its hash, to be compared when training is over. `select(model, "modules")` with a proof."""
    select(model, "modules")
    return core_hash(model)


def select(model: nn.Module, what: str) -> list[nn.Parameter]:
    """Say what is trained by `requires_grad`, and return it: one of `TRAIN`. Raises ConfigError for anything else."""
    if what not in TRAIN:
        raise ConfigError("modular.train", what, f"must be one of {', '.join(TRAIN)}", "use modules")
    for parameter in model.parameters():
        parameter.requires_grad_(what == "joint")
    chosen = list(model.parameters()) if what == "joint" else list(_of_modules(model, what))
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def _of_modules(model: nn.Module, what: str) -> Iterator[nn.Parameter]:
    for layer in layers(model).values():
        if what != "router":
            yield from layer.experts.parameters()
        if what != "one_module":
            yield from layer.router.parameters()
            yield from layer.aggregation.parameters()
