"""LoRA in the format of Hugging Face's `peft`, fused experts by its `target_parameters`.

    peft's lora_A.weight [E*r, in], row e*r + i          is A[e, i]
    peft's lora_B.weight [out, r*E], column i*E + e      is B[e, :, i]

peft wraps a module once per targeted weight, the first one innermost: the factors of the n-th of N
stacks of a module are at `experts` with N - 1 - n times `.base_layer` behind it.

Letters: E experts, r rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmoe.checkpoint.consensus import RankGroup
from dmoe.checkpoint.tensor_reader import TensorReader
from dmoe.config.errors import CheckpointError, ConfigError
from dmoe.config.published import read_config
from dmoe.distributed.expert_parallel import expert_parameters
from dmoe.distributed.full_tensors import gather_full
from dmoe.distributed.mesh import ParallelMesh
from dmoe.distributed.parallel_model import ParallelModel
from dmoe.hf.export import check_source, commit, model_section, prefix_of, reserve
from dmoe.hf.lora import EXPERTS, LoraPlace, add_lora, is_lora, lora_places, remove_lora
from dmoe.hf.model import build_empty
from dmoe.hf.moefy import moefy
from dmoe.hf.published import read_json
from dmoe.modular.peft import CONFIG, SAFE_INITS, UNSUPPORTED, WEIGHTS

PREFIX = "base_model.model."


def save_lora(model: nn.Module, folder: str | Path) -> None:
    """Save the factors as a directory that `peft.PeftModel.from_pretrained` loads; collective.

    Args:
        model: a model of `add_lora`, in `dmoe.parallelize` or on one process.
        folder: directory to create, that the first rank sees.

    Raises:
        CheckpointError: on every rank, if the first cannot write; `folder` is not created then.
        ConfigError: the model has no LoRA.
    """
    mesh = model.mesh if isinstance(model, ParallelModel) else ParallelMesh()
    inner = cast(Any, model.module if isinstance(model, ParallelModel) else model)
    places = list(lora_places(inner))
    if not places:
        raise ConfigError("model", type(inner).__name__, "has no LoRA", "call add_lora first")
    stacks = set(expert_parameters(inner))

    def gathered(place: LoraPlace, factor: str) -> Tensor:
        name = f"{place.module_name}.{factor}"
        value = getattr(place.module, factor)
        return gather_full({name: value}, stacks, mesh)[name].cpu()

    tensors = peft_tensors(places, gathered)
    with RankGroup(mesh.checkpoint_group).all_or_none("save_lora"):
        if mesh.rank == 0:
            write_peft(folder, places, tensors, getattr(inner.config, "_name_or_path", None))


def export_lora(checkpoint: Path, source: str, out: str | Path) -> int:
    """Write the factors of a checkpoint as a directory of peft; return their number.

    Args:
        checkpoint: directory of one checkpoint, of a run with `model.lora`.
        source: directory or hub name of the published model.
        out: directory to create.

    Raises:
        CheckpointError: a damaged checkpoint, or one of a run without LoRA.
        ConfigError: `out` exists and is not empty.
    """
    reader = TensorReader(checkpoint)
    lora = model_section(reader.extra).get("lora") or {}
    if not lora.get("rank"):
        raise CheckpointError(f"{checkpoint}: is of a run without model.lora")
    check_source(reader.extra, source)
    model = moefy(build_empty(read_config(source), source))
    add_lora(model, lora["rank"], lora["alpha"], lora["targets"] or None)
    prefix = prefix_of(reader, {n: tuple(v.shape) for n, v in model.state_dict().items()})
    places = list(lora_places(model))
    patterns = (reader.extra["config"].get("optim") or {}).get("trainable") or []
    for name, _ in model.named_parameters():
        saved = prefix.removeprefix("model.") + name
        if not is_lora(name) and any(fnmatchcase(saved, pattern) for pattern in patterns):
            why = f"trained {saved} too (optim.trainable), which an adapter leaves out"
            raise CheckpointError(f"{checkpoint}: {why}; export it without --adapter")

    def read(place: LoraPlace, factor: str) -> Tensor:
        return reader.read(f"{prefix}{place.module_name}.{factor}")

    tensors = peft_tensors(places, read)
    write_peft(out, places, tensors, source)
    return len(tensors)


def peft_tensors(
    places: Iterable[LoraPlace], read: Callable[[LoraPlace, str], Tensor]
) -> dict[str, Tensor]:
    """Return the factors in peft's layout, by peft's names.

    Args:
        places: all weights with factors.
        read: returns a factor of a place in full, e.g. [E, r, in].
    """
    places, found = list(places), {}
    for place in places:
        a, b = read(place, place.a).detach(), read(place, place.b).detach()
        if place.is_stack:
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1, 2)
        name = PREFIX + wrapper_name(place, places)
        found[f"{name}.lora_A.weight"] = a.contiguous().clone()
        found[f"{name}.lora_B.weight"] = b.contiguous().clone()
    return found


def wrapper_name(place: LoraPlace, places: Iterable[LoraPlace]) -> str:
    """Return the name of the module of peft that has the factors of a weight."""
    beside = [other.weight for other in places if other.module_name == place.module_name]
    return place.module_name + ".base_layer" * (len(beside) - 1 - beside.index(place.weight))


def write_peft(
    folder: str | Path,
    places: Iterable[LoraPlace],
    tensors: dict[str, Tensor],
    base_model: str | None,
) -> None:
    """Write a directory of peft under another name, then rename it.

    Raises:
        ConfigError: it exists and is not empty.
    """
    places, out = list(places), Path(folder)
    rank = int(getattr(places[0].module, places[0].a).shape[-2])
    stacks = sorted({f"{EXPERTS}.{place.weight}" for place in places if place.is_stack})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": places[0].scale * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(place.module_name for place in places if not place.is_stack),
        "target_parameters": stacks or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    reserve(out)
    with commit(out) as made:
        save_file(tensors, made / WEIGHTS, {"format": "pt"})
        (made / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_lora(model: nn.Module, folder: str | Path) -> nn.Module:
    """Add the adapter that peft has saved to a moefied model, in place; return the model.

    Before `dmoe.parallelize`. Everything but the factors is frozen, as by `add_lora`.

    Raises:
        CheckpointError: a setting that changes what the adapter computes, or factors that do not
            fit the model. The model is as before then.
    """
    path = Path(folder)
    try:
        config = read_json(path / CONFIG)
        tensors = load_file(path / WEIGHTS)
    except (OSError, ValueError, SafetensorError, CheckpointError) as error:
        raise CheckpointError(f"{path}: holds no adapter of peft ({error})") from None
    allowed = {name for name in UNSUPPORTED if name != "target_parameters"}
    wrong = sorted(name for name in allowed if config.get(name))
    if config.get("init_lora_weights", True) not in SAFE_INITS:
        wrong.append("init_lora_weights")
    if config.get("peft_type") != "LORA" or wrong or config.get("bias", "none") != "none":
        what = wrong[0] if wrong else "bias or peft_type"
        raise CheckpointError(f"{path}: {what}={config.get(what)} is not supported")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1 or alpha <= 0:
        raise CheckpointError(f"{path}: r={rank} and lora_alpha={alpha} scale no adapter")
    alpha *= rank**0.5 if config.get("use_rslora") else 1.0
    given = config.get("target_modules") or []
    targets = [given] if isinstance(given, str) else list(given)
    stacks = config.get("target_parameters") or []
    add_lora(model, rank, alpha, [*targets, *([EXPERTS] if stacks else [])])
    try:
        _copy_factors(model, path, tensors)
    except CheckpointError:
        remove_lora(model)
        raise
    return model


def _copy_factors(model: nn.Module, path: Path, tensors: dict[str, Tensor]) -> None:
    """Copy tensors in peft's layout to the factors of a model; `path` is for errors."""
    places = list(lora_places(model))
    names = {
        f"{PREFIX}{wrapper_name(p, places)}.lora_{side}.weight" for p in places for side in "AB"
    }
    if other := sorted(names ^ tensors.keys()):
        where = "the adapter" if other[0] in tensors else "the model"
        raise CheckpointError(f"{path}: {other[0]} is in {where} only")
    for place in places:
        name = PREFIX + wrapper_name(place, places)
        a, b = (getattr(place.module, factor) for factor in (place.a, place.b))
        theirs_a, theirs_b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        experts, rank = (len(a) if place.is_stack else 1), a.shape[-2]
        shapes = (experts * rank, a.shape[-1]), (b.shape[-2], rank * experts)
        if (theirs_a.shape, theirs_b.shape) != shapes:
            raise CheckpointError(f"{path}: {name} has factors of another shape than the model's")
        if place.is_stack:
            theirs_a = theirs_a.view(a.shape)
            theirs_b = theirs_b.view(len(theirs_b), rank, experts).permute(2, 0, 1)
        with torch.no_grad():
            a.copy_(theirs_a)
            b.copy_(theirs_b)
