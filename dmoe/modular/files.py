"""Module files: adapter layers in safetensors, a few percent of the model, without the base model.

Tensor names are `TARGET.modular.experts.a` and so on, as in the model's state. The metadata holds
the format, the hash of the base model and a summary of each layer, so a file can be listed without
a model. Files are written to a temporary name and renamed. No pickle.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dmoe.config.errors import CheckpointError
from dmoe.modular.attach import CHILD, adapter_layers
from dmoe.modular.base_model import base_model_hash

FORMAT = "dmoe modules 1"
RENAMED = {"LowRank": "LoRA", "SoftRouter": "DenseRouter"}
"""Class names in module files written before 2026-12, and what they are called now."""


@dataclass(frozen=True)
class SavedModules:
    """The header of a module file."""

    base_model: str
    """SHA-256 of the base model (`base_model_hash`)."""
    targets: dict[str, dict[str, str | int]]
    """Per target module: `bank`, `router`, `aggregation` (class names), `modules` (M) and
    `parameters` of the bank."""


def module_state(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers of all adapter layers by name; detached views."""
    # built from the layers, because `model.state_dict()` lists a target used twice under two names
    return {
        f"{target}.{CHILD}.{name}".removeprefix("."): value.detach()
        for target, layer in adapter_layers(model).items()
        for name, value in layer.state_dict().items()
    }


def save_modules(model: nn.Module, path: str | Path, *, base_model: str | None = None) -> None:
    """Write the modules of a model into a file.

    Args:
        model: a network with adapter layers that are not sharded.
        path: the file.
        base_model: hash of the base model, if it is known already.

    Raises:
        CheckpointError: for a model without modules or with sharded ones, or if the file cannot be
            written.
    """
    layers = adapter_layers(model)
    if not layers:
        raise CheckpointError(f"{path}: the model has no modules to save; attach some first")
    for name, layer in layers.items():
        if not layer.experts.holds_all_modules:
            raise CheckpointError(
                f"{path}: this rank holds only part of the modules at {name}; gather them first"
            )
    targets = {
        name: {
            "bank": type(layer.experts).__name__,
            "router": type(layer.router).__name__,
            "aggregation": type(layer.aggregation).__name__,
            "modules": layer.experts.num_modules,
            "parameters": sum(parameter.numel() for parameter in layer.experts.parameters()),
        }
        for name, layer in layers.items()
    }
    metadata = {
        "format": FORMAT,
        "core": base_model or base_model_hash(model),
        "places": json.dumps(targets),
    }
    state = {name: value.cpu().contiguous() for name, value in module_state(model).items()}
    part = Path(f"{path}.part")
    try:
        save_file(state, part, metadata)
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot be written ({error})") from None


def inspect_modules(path: str | Path) -> SavedModules:
    """Read the header of a module file. Raises CheckpointError if it is not one."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as a module file ({error})") from None
    if (found := metadata.get("format")) != FORMAT:
        raise CheckpointError(
            f"{path}: is not a module file (its format is {found!r}, not {FORMAT!r})"
        )
    return SavedModules(metadata["core"], json.loads(metadata["places"]))


def load_modules(model: nn.Module, path: str | Path, *, base_model: str | None = None) -> None:
    """Load a module file into the attached adapter layers; a sharded bank loads its shard.

    Args:
        model: a network with adapter layers; changed in place.
        path: the file.
        base_model: hash of the model's base model, if it was taken before sharding.

    Raises:
        CheckpointError: for another base model, or other targets, kinds or shapes. Then nothing is
            loaded.
    """
    saved = inspect_modules(path)
    own_hash = base_model or base_model_hash(model)
    if own_hash != saved.base_model:
        raise CheckpointError(
            f"{path}: belongs to another base model ({saved.base_model[:12]}, this one is "
            f"{own_hash[:12]}); attach it to the model it was trained on"
        )
    state = module_state(model)
    _check_same_layers(model, path, saved)
    with safe_open(path, framework="pt") as file:
        if different := sorted(set(file.keys()) ^ set(state)):
            raise CheckpointError(
                f"{path}: {different[0]} is in the file or in the model but not in both "
                f"({len(different)} such names)"
            )
        loaded = {name: _local_part(model, name, file.get_tensor(name)) for name in state}
    for name, value in loaded.items():
        if value.shape != state[name].shape or value.dtype != state[name].dtype:
            in_file, in_model = (
                f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}"
                for t in (value, state[name])
            )
            raise CheckpointError(
                f"{path}: {name} is {in_file} in the file and {in_model} in the model"
            )
    with torch.no_grad():
        for name, value in loaded.items():
            state[name].copy_(value)


def _check_same_layers(model: nn.Module, path: str | Path, saved: SavedModules) -> None:
    layers = adapter_layers(model)
    if sorted(layers) != sorted(saved.targets):
        raise CheckpointError(
            f"{path}: has modules at {', '.join(sorted(saved.targets))}, "
            f"the model at {', '.join(sorted(layers)) or 'no target'}"
        )
    for name, target in saved.targets.items():
        layer = layers[name]
        kinds = [type(part).__name__ for part in (layer.experts, layer.router, layer.aggregation)]
        if (
            kinds
            != [_current_name(str(target[part])) for part in ("bank", "router", "aggregation")]
            or target["modules"] != layer.experts.num_modules
        ):
            in_model = f"{layer.experts.num_modules} of {' with '.join(kinds)}"
            in_file = (
                f"{target['modules']} of {target['bank']} with {target['router']} "
                f"with {target['aggregation']}"
            )
            raise CheckpointError(f"{path}: at {name} it has {in_file}, the model {in_model}")


def _current_name(class_name: str) -> str:
    """Return today's name of a class that files of earlier versions name otherwise."""
    return RENAMED.get(class_name, class_name)


def _local_part(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """Return this rank's modules of a stacked tensor; other tensors unchanged."""
    before, _, after = name.rpartition(f"{CHILD}.")
    if not after.startswith("experts."):
        return value
    bank = adapter_layers(model)[before.rstrip(".")].experts
    return value[bank.first : bank.first + bank.local_modules]
