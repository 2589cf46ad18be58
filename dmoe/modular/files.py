"""Modules in a file of their own: safetensors, a few percent of the model, with the hash of the core they belong to.

Names are `PLACE.modular.experts.a` and so on, as in the model's own state; the metadata holds the format, the core's hash and what each
place holds, so that a file can be listed without a model. Written whole or not at all. No pickle.
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


@dataclass(frozen=True)
class SavedModules:
    """What a file says of itself."""

    base_model: str
    """SHA-256 of the core (`core_hash`)."""
    targets: dict[str, dict[str, str | int]]
    """For each place: `bank`, `router`, `aggregation` (their classes), `modules` (M), `parameters` of the bank."""


def module_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer of the modules, routers and aggregations, by name; detached, sharing memory."""
    return {
        f"{place}.{CHILD}.{name}".removeprefix("."): value.detach()
        for place, layer in adapter_layers(
            model
        ).items()  # not by the model's own names: a part used in two places has two there
        for name, value in layer.state_dict().items()
    }


def save_modules(model: nn.Module, path: str | Path, *, base_model: str | None = None) -> None:
    """Write the modules of a model that holds all of them. `core` is its hash, where that is known already.

    Raises: CheckpointError for a model without modules, or one that holds a part of them only, and where nothing can be written.
    """
    found = adapter_layers(model)
    if not found:
        raise CheckpointError(f"{path}: the model has no modules to save; attach some first")
    for name, layer in found.items():
        if not layer.experts.holds_all_modules:
            raise CheckpointError(
                f"{path}: this rank holds a part of the modules at {name} only; gather them first"
            )
    places = {
        name: {
            "bank": type(layer.experts).__name__,
            "router": type(layer.router).__name__,
            "aggregation": type(layer.aggregation).__name__,
            "modules": layer.experts.num_modules,
            "parameters": sum(parameter.numel() for parameter in layer.experts.parameters()),
        }
        for name, layer in found.items()
    }
    metadata = {"format": FORMAT, "core": base_model or base_model_hash(model), "places": json.dumps(places)}
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
    """What a file holds, from its header alone. Raises CheckpointError where it is no file of modules."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as a file of modules ({error})") from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: is no file of modules (its format is {metadata.get('format')!r}, not {FORMAT!r})"
        )
    return SavedModules(metadata["core"], json.loads(metadata["places"]))


def load_modules(model: nn.Module, path: str | Path, *, base_model: str | None = None) -> None:
    """Read modules into those that are attached to the model, in place; a rank that holds a part of a bank takes its part.

    `core` is the hash of the model's core, where it was taken before sharding.
    Raises: CheckpointError for another core, other places, other kinds or shapes; then nothing was read.
    """
    saved = inspect_modules(path)
    mine = base_model or base_model_hash(model)
    if mine != saved.base_model:
        raise CheckpointError(
            f"{path}: belongs to another core ({saved.base_model[:12]}, this one is {mine[:12]}); attach it to the model it was trained on"
        )
    state = module_state(model)
    _check_same_layers(model, path, saved)
    with safe_open(path, framework="pt") as file:
        if missing := sorted(set(file.keys()) ^ set(state)):
            raise CheckpointError(
                f"{path}: {missing[0]} is in the file or in the model but not in both ({len(missing)} such names)"
            )
        read = {name: _local_part(model, name, file.get_tensor(name)) for name in state}
    for name, value in read.items():
        if value.shape != state[name].shape or value.dtype != state[name].dtype:
            one, other = (
                f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}"
                for t in (value, state[name])
            )
            raise CheckpointError(f"{path}: {name} is {one} in the file and {other} in the model")
    with torch.no_grad():
        for name, value in read.items():
            state[name].copy_(value)


def _check_same_layers(model: nn.Module, path: str | Path, saved: SavedModules) -> None:
    found = adapter_layers(model)
    if sorted(found) != sorted(saved.targets):
        raise CheckpointError(
            f"{path}: has modules at {', '.join(sorted(saved.targets))}, the model at {', '.join(sorted(found)) or 'no place'}"
        )
    for name, place in saved.targets.items():
        layer = found[name]
        kinds = [type(part).__name__ for part in (layer.experts, layer.router, layer.aggregation)]
        if (
            kinds != [place["bank"], place["router"], place["aggregation"]]
            or place["modules"] != layer.experts.num_modules
        ):
            here = f"{layer.experts.num_modules} of {' with '.join(kinds)}"
            there = f"{place['modules']} of {place['bank']} with {place['router']} with {place['aggregation']}"
            raise CheckpointError(f"{path}: at {name} it has {there}, the model {here}")


def _local_part(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """This rank's modules of a stacked tensor; anything else as it is."""
    before, _, after = name.rpartition(f"{CHILD}.")
    if not after.startswith("experts."):
        return value
    bank = adapter_layers(model)[before.rstrip(".")].experts
    return value[bank.first : bank.first + bank.local_modules]
