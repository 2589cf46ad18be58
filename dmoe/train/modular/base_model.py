"""The weights a run starts from: `modular.core`.

A core is a checkpoint of the same network (sections `model` and `moe`), of a run at any world and EP size. If it has modules of its
own, they come with it, and a run with more of them starts the others anew, as `dmoe.modular.grow` does: continual learning by
addition. Routers and aggregations come along where they are of the same kind; the weights of `constant` and the rows of `table` are
always those of the config at hand.

What was frozen is what it was: a hash before the first step of this process, and one after the last.

Each rank hashes what it holds, name by name and byte by byte, and the ranks' hashes are hashed in their order. So it is compared with
itself only, at one topology; `dmoe.modular.core_hash` is the hash of a whole core. Reads every byte: about a second for each GB.
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

IGNORED_FIELDS = ("moe.exchange",)
"""What a core may have been trained with otherwise: it changes no number."""
SHARED_MODULE_FIELDS = ("bank", "at", "rank", "alpha", "hidden", "reads", "length", "density")
"""What modules are: those of the core are of no use to others."""
ROUTER_STD = 0.02


def find_base_model(path: str, engine: Engine) -> Path:
    """The checkpoint at `path`, or the newest whole one of the run at `path`, which is one or the other (`stages.check_stages`).

    Collective. Raises: CheckpointError for a run without a whole checkpoint.
    """
    place = Path(path).expanduser()
    if (place / "manifest.json").is_file():
        return place.resolve()
    newest = save_load.find_latest(
        place.resolve() / "checkpoints", group=engine.mesh.checkpoint_group
    )
    if newest is None:
        raise CheckpointError(f"modular.core={path}: the run has no checkpoint yet")
    return newest


def check_base_model(config: Config, core: Mapping[str, Any], name: str) -> None:
    """Refuse a core, given by the config it was trained with, that is another network. Raises ConfigError naming the field."""
    now = asdict(config)
    for section in ("model", "moe"):
        for field, mine, theirs in _differences(now[section], core.get(section, {}), f"{section}."):
            if field not in IGNORED_FIELDS:
                allowed = f"the core {name} has {theirs}"
                raise ConfigError(field, mine, allowed, "use that, or another modular.core")
    theirs = core.get("modular", {"bank": "none"})
    if theirs["bank"] == "none":
        return
    for field in SHARED_MODULE_FIELDS:
        mine = getattr(config.modular, field)
        if theirs.get(field, getattr(ModularConfig(), field)) != mine:
            allowed = f"the modules of the core {name} have {theirs.get(field)}"
            raise ConfigError(
                f"modular.{field}", mine, allowed, "use that, or another modular.core"
            )
    if theirs["modules"] > config.modular.modules:
        allowed = f"the core {name} has {theirs['modules']} modules"
        raise ConfigError(
            "modular.modules", config.modular.modules, allowed, "use as many, or more for new ones"
        )


def load_base_model(engine: Engine, path: Path) -> None:
    """Give the engine's model the weights of the checkpoint at `path`; what is new keeps those of the seed. Collective.

    Cost: the core's tensors are read by the ranks that hold them; its modules whole by every rank, which are a few percent of them.
    Raises: ConfigError for another network; CheckpointError for a damaged checkpoint, or tensors of other shapes (another vocabulary).
    """
    group = engine.mesh.checkpoint_group
    found = save_load.read_manifest_on_all(path, group=group)
    if not isinstance(found.extra.get("config"), dict):
        raise CheckpointError(f"modular.core={path}: does not say what it was trained with")
    check_base_model(engine.config, found.extra["config"], str(path))
    mine = model_state(engine.model, engine.mesh)
    modules = _empty_module_tensors(found)
    core = {name: value for name, value in mine.items() if CHILD not in name.split(".")}
    save_load.load(path, core | modules, prefix="model.", group=group)
    theirs = found.extra["config"].get("modular", {})
    for name in sorted(modules):
        if _is_reused(name, theirs, engine.config.modular):
            _copy_modules(name, mine.get(name), modules[name], engine.config)


def _empty_module_tensors(found: Manifest) -> dict[str, Tensor]:
    """Tensors to read the core's modules into."""
    return {
        name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        for name, entry in found.tensors.items()
        if name.startswith("model.") and CHILD in name.split(".")
    }


def _is_reused(name: str, core: Mapping[str, Any], now: ModularConfig) -> bool:
    part = name.split(f".{CHILD}.")[1].split(".")[0]
    if part == "experts":
        return True
    if part == "aggregation":
        return bool(core["aggregation"] == now.aggregation)
    alike = all(core.get(field) == getattr(now, field) for field in ("routing", "per", "labels"))
    return alike and is_learned(now)


def _copy_modules(name: str, mine: Tensor | None, theirs: Tensor, config: Config) -> None:
    """The core's modules first; those it does not have keep their draw, and get rows of their own in a router."""
    whole = None if mine is None else full_tensor(mine)
    if (
        mine is None
        or whole is None
        or whole.shape[1:] != theirs.shape[1:]
        or len(whole) < len(theirs)
    ):
        shown = "nothing" if whole is None else f"{list(whole.shape)}"
        raise CheckpointError(
            f"modular.core: {name} is {list(theirs.shape)} in the core and {shown} in this run"
        )
    if ".router." in name and len(whole) > len(theirs):
        for row in range(len(theirs), len(whole)):
            if whole.dim() > 1:
                normal_(whole[row], ROUTER_STD, config.train.seed, "router", name, "grown", row)
            else:  # a bias
                whole[row] = 0.0
    whole[: len(theirs)] = theirs.to(whole.device)
    copy_full_into_shard(mine, whole)


def _differences(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str
) -> list[tuple[str, Any, Any]]:
    """Fields that differ; one that the core's version did not know is at its default there."""
    found: list[tuple[str, Any, Any]] = []
    for key, value in mine.items():
        if isinstance(value, Mapping):
            found += _differences(value, theirs.get(key, {}), f"{prefix}{key}.")
        elif key in theirs and theirs[key] != value:
            found.append((f"{prefix}{key}", value, theirs[key]))
    return found
