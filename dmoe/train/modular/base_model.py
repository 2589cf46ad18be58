"""The weights that a run starts from: `modular.core`, its base model.

A base model is a checkpoint of the same network (sections `model` and `moe`), from a run of any
world and EP size. If it has modules, they are loaded too. A run with more modules initializes the
others, as `dmoe.modular.add_modules` does: continual learning by addition. Routers and aggregations
are loaded if they are of the same kind; the weights of `constant` and the rows of `table` are
always those of the current config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmoe.checkpoint import save_load
from dmoe.checkpoint.manifest import Manifest
from dmoe.config.errors import CheckpointError, ConfigError
from dmoe.config.rules.modular import is_learned
from dmoe.config.schema import Config, ModularConfig
from dmoe.distributed.full_tensors import copy_full_into_shard, full_tensor
from dmoe.distributed.state_dict import model_state
from dmoe.modular.attach import CHILD
from dmoe.moe.rng import normal_
from dmoe.train.engine import Engine

IGNORED_FIELDS = ("moe.exchange", "moe.kernels")
"""Fields that may differ from the base model's config: they change no number."""
SHARED_MODULE_FIELDS = ("bank", "at", "rank", "alpha", "hidden", "reads", "length", "density")
"""Fields of `modular` that must equal those of the base model if it has modules."""
ROUTER_STD = 0.02


def find_base_model(path: str, engine: Engine) -> Path:
    """Return the checkpoint at `path`, or the newest complete one of the run at `path`.

    Collective. Raises: CheckpointError for a run without a complete checkpoint.
    """
    source = Path(path).expanduser()
    if (source / "manifest.json").is_file():
        return source.resolve()
    newest = save_load.find_latest(
        source.resolve() / "checkpoints", group=engine.mesh.checkpoint_group
    )
    if newest is None:
        raise CheckpointError(f"modular.core={path}: the run has no checkpoint yet")
    return newest


def check_base_model(config: Config, base: Mapping[str, Any], name: str) -> None:
    """Refuse a base model that is another network.

    Args:
        config: config of the run.
        base: config of the base model, as recorded in its checkpoint.
        name: path of the base model, for the message.

    Raises:
        ConfigError: naming the field that differs.
    """
    now, fix = asdict(config), "use that, or another modular.core"
    for section in ("model", "moe"):
        for field, own, other in _differences(now[section], base.get(section, {}), f"{section}."):
            if field not in IGNORED_FIELDS:
                raise ConfigError(field, own, f"the base model {name} has {other}", fix)
    modular = base.get("modular", {"bank": "none"})
    if modular["bank"] == "none":
        return
    for field in SHARED_MODULE_FIELDS:
        own = getattr(config.modular, field)
        if modular.get(field, getattr(ModularConfig(), field)) != own:
            allowed = f"the modules of the base model {name} have {modular.get(field)}"
            raise ConfigError(f"modular.{field}", own, allowed, fix)
    if modular["modules"] > config.modular.modules:
        allowed = f"the base model {name} has {modular['modules']} modules"
        fix = "use as many, or more for new ones"
        raise ConfigError("modular.modules", config.modular.modules, allowed, fix)


def load_base_model(engine: Engine, path: Path) -> None:
    """Load the checkpoint at `path` into the engine's model.

    New modules keep their initial weights. Collective. Cost: each rank reads its shards of the
    base model, and all modules, which are a few percent of it.

    Raises: ConfigError for another network; CheckpointError for a damaged checkpoint, or tensors of
    other shapes (another vocabulary).
    """
    group = engine.mesh.checkpoint_group
    manifest = save_load.read_manifest_on_all(path, group=group)
    if not isinstance(manifest.extra.get("config"), dict):
        raise CheckpointError(f"modular.core={path}: does not record the config of its training")
    check_base_model(engine.config, manifest.extra["config"], str(path))
    state = model_state(engine.model, engine.mesh)
    modules = _empty_module_tensors(manifest)
    base = {name: value for name, value in state.items() if CHILD not in name.split(".")}
    save_load.load(path, base | modules, prefix="model.", group=group)
    recorded = manifest.extra["config"].get("modular", {})
    for name in sorted(modules):
        if _is_reused(name, recorded, engine.config.modular):
            _copy_modules(name, state.get(name), modules[name], engine.config.train.seed)


def _empty_module_tensors(manifest: Manifest) -> dict[str, Tensor]:
    """Return empty tensors for the base model's modules."""
    return {
        name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        for name, entry in manifest.tensors.items()
        if name.startswith("model.") and CHILD in name.split(".")
    }


def _is_reused(name: str, base: Mapping[str, Any], now: ModularConfig) -> bool:
    """Return True if this tensor of the base model (section `modular`: `base`) is loaded."""
    part = name.split(f".{CHILD}.")[1].split(".")[0]
    if part == "experts":
        return True
    if part == "aggregation":
        return bool(base["aggregation"] == now.aggregation)
    same = all(base.get(field) == getattr(now, field) for field in ("routing", "per", "labels"))
    return same and is_learned(now)


def _copy_modules(name: str, target: Tensor | None, saved: Tensor, seed: int) -> None:
    """Copy the base model's modules into the first rows of a (sharded) tensor of this run.

    The other rows keep their initial weights. In a router they are drawn again, keyed by name and
    row.
    """
    full = None if target is None else full_tensor(target)
    if (
        target is None
        or full is None
        or full.shape[1:] != saved.shape[1:]
        or len(full) < len(saved)
    ):
        shown = "missing" if full is None else f"{list(full.shape)}"
        raise CheckpointError(
            f"modular.core: {name} is {list(saved.shape)} in the base model and {shown} in this run"
        )
    if ".router." in name and len(full) > len(saved):
        for row in range(len(saved), len(full)):
            if full.dim() > 1:
                normal_(full[row], ROUTER_STD, seed, "router", name, "grown", row)
            else:
                # the selection bias
                full[row] = 0.0
    full[: len(saved)] = saved.to(full.device)
    copy_full_into_shard(target, full)


def _differences(
    own: Mapping[str, Any], other: Mapping[str, Any], prefix: str
) -> list[tuple[str, Any, Any]]:
    """Return (field, own value, other value) of fields that differ.

    A field that `other` lacks, because its version did not have it, has its default there.
    """
    found: list[tuple[str, Any, Any]] = []
    for key, value in own.items():
        if isinstance(value, Mapping):
            found += _differences(value, other.get(key, {}), f"{prefix}{key}.")
        elif key in other and other[key] != value:
            found.append((f"{prefix}{key}", value, other[key]))
    return found
