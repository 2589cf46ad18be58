"""Read the weights of a published model; each rank reads its own experts only.

`from_pretrained` of transformers reads the files and converts their layout (one tensor per expert
becomes a stack). With expert parallelism a subclass made here turns the stacks of experts into
DTensors over the ranks that share them before anything is read: transformers then reads only what a
rank holds. Memory: this rank's part of the model.

Files of FP8 and MXFP4 are dequantised; every rank then reads all experts of the file.

Letters: E experts, e local experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import nullcontext
from statistics import mode
from typing import Any, cast

import torch
from torch import Tensor, nn

from dmoe.checkpoint.consensus import RankGroup
from dmoe.config.errors import CheckpointError, ConfigError
from dmoe.config.published import DEQUANTIZED, quantization_of, source_directory
from dmoe.config.transformers_log import quiet
from dmoe.distributed.expert_parallel import expert_group_of, stacks_over_ranks
from dmoe.distributed.gradients import local_tensor
from dmoe.hf.adapters import EXPERT_ID, has_identities, has_unread_rows, trimmed_class
from dmoe.hf.lora import is_lora
from dmoe.hf.moefy import find_blocks, moefied_layers
from dmoe.hf.published import PublishedDirectory

FIX = "check its files and its config.json, or download it again"


def load_weights(model: nn.Module, source: str) -> list[str]:
    """Fill a moefied model, sharded or not, from the files of `source`.

    Args:
        model: of transformers, moefied, with memory.
        source: directory or hub name.

    Returns:
        Notes: what was dequantised, and tensors that the model does not have.

    Raises:
        ConfigError: files that are missing, damaged, or of another model.
    """
    directory = source_directory(source)
    if not any(directory.glob("*.safetensors")):
        allowed = "has no *.safetensors"
        raise ConfigError("model.source", source, allowed, "name a directory of save_pretrained")
    try:
        files = PublishedDirectory(directory)
    except CheckpointError as error:
        raise ConfigError("model.source", source, f"cannot be read: {error}", FIX) from None
    notes: list[str] = []
    extra: dict[str, Any] = {}
    method = quantization_of(source)
    if method is not None:
        import transformers

        extra["quantization_config"] = getattr(transformers, DEQUANTIZED[method])(dequantize=True)
        notes.append(f"model.source is quantised ({method}): read as {_dtype(model)}")
    kind, ep_group = cast(Any, type(model)), expert_group_of(moefied_layers(model)[0])
    # of LongCat's identities: a file that has their rows is read whole
    unread = has_identities(model) and has_unread_rows(model, files.tensors)
    group = None if method or unread else ep_group
    if has_identities(model) and not unread:
        kind = trimmed_class(kind)
    if group is not None and hasattr(kind, "maybe_distribute_model"):
        kind, more = _reading_own_experts(kind, group)
        extra |= more
    try:
        with nullcontext() if ep_group is None else RankGroup(ep_group).all_or_none("reading"):
            loaded, unexpected = _read(kind, model, files, extra)
            _check_finite(loaded)
    except CheckpointError as error:  # of any rank: one expert's tensor is read by one rank
        raise ConfigError("model.source", source, str(error), FIX) from error
    _restore(loaded, files)
    _copy(model, loaded)
    return notes + _left_out(files, loaded, unexpected)


def _read(
    kind: Any, model: nn.Module, files: PublishedDirectory, extra: dict[str, Any]
) -> tuple[nn.Module, set[str]]:
    """Return the model that transformers loads, and the names of tensors that it has no place for.

    Raises:
        CheckpointError: files that are damaged, or of another model.
    """
    try:
        with quiet():
            loaded, info = kind.from_pretrained(
                files.folder,
                dtype=_dtype(model),
                attn_implementation=cast(Any, model).config._attn_implementation,
                experts_implementation="eager",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                use_safetensors=True,
                **extra,
            )
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        why = f"cannot be read: {type(error).__name__}: {said}"
        raise CheckpointError(_odd_expert(model, files) or why) from error
    for name, found, wanted in sorted(info["mismatched_keys"]):
        shapes = f"{list(found)}, and config.json says {list(wanted)}"
        raise CheckpointError(_odd_expert(model, files) or f"gives {name} the shape {shapes}")
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"lacks {len(missing)} tensors of the model, such as {missing[0]}")
    return loaded, info["unexpected_keys"]


def _check_finite(loaded: nn.Module) -> None:
    """Refuse weights that no training could use: the first step would stop without a cause.

    Cost: one pass over this rank's part, without a further tensor.

    Raises:
        CheckpointError: a parameter has a NaN or an infinity.
    """
    for name, parameter in loaded.named_parameters():
        value = local_tensor(parameter.detach())
        # a NaN is both the least and the largest
        if value.numel() and not all(end.isfinite() for end in value.aminmax()):
            raise CheckpointError(f"gives {name} numbers that are not finite")


def _odd_expert(model: nn.Module, files: PublishedDirectory) -> str | None:
    """Describe a tensor of one expert that is missing, or unlike those of the experts beside it.

    transformers, which stacks them, then says no more than "see the above report".
    """
    if has_identities(model):  # whose stacks are unequal
        return None
    layers: dict[str, dict[str, dict[int, tuple[int, ...]]]] = {}
    for name, facts in files.tensors.items():
        if found := EXPERT_ID.search(name):
            stacks = layers.setdefault(name[: found.start()], {})
            stacks.setdefault(name[found.end() :], {})[int(found[0])] = facts.shape
    for head, stacks in layers.items():
        last = max(max(shapes) for shapes in stacks.values())
        for tail, shapes in stacks.items():
            usual = mode(shapes.values())
            for e in range(last + 1):
                if e not in shapes:
                    return f"lacks {head}{e}{tail}"
                if shapes[e] != usual:
                    others = f"and of the other experts {list(usual)}"
                    return f"gives {head}{e}{tail} the shape {list(shapes[e])}, {others}"
    return None


def _reading_own_experts(kind: Any, group: Any) -> tuple[Any, dict[str, Any]]:
    """Return a subclass that reads only this rank's experts, and an argument of its reader."""
    from transformers.distributed.configuration_utils import DistributedConfig

    def place(cls: Any, model: nn.Module, config: object, manager: object) -> nn.Module:
        device_mesh = stacks_over_ranks([e for _, _, e in find_blocks(model)], group)
        made = cast(Any, model)
        made._device_mesh, made._is_distributed_loading_by_transformers = device_mesh, True
        return model

    def prepare(cls: Any, config: object, device_map: object = None) -> tuple[object, Any, None]:
        return config, torch.device("cpu"), None

    methods = {
        "maybe_distribute_model": classmethod(place),
        "prepare_distribute_model": classmethod(prepare),
        "__module__": kind.__module__,
    }
    return type(kind.__name__, (kind,), methods), {"distributed_config": DistributedConfig()}


def _restore(loaded: nn.Module, files: PublishedDirectory) -> None:
    """Read the biases of ZAYA's choice again: transformers 5.23 sets their last number to -1."""
    for name, buffer in loaded.named_buffers():
        if name.endswith(".balancing_biases"):
            buffer.copy_(files.read(name))


def _copy(model: nn.Module, loaded: nn.Module) -> None:
    """Move the tensors of `loaded` into the model, one at a time."""
    first = {
        id(parameter): layer.experts.first_expert
        for layer in moefied_layers(model)
        for parameter in layer.experts.parameters(recurse=False)
    }
    targets: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    targets = {name: value for name, value in targets.items() if not is_lora(name)}
    sources = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    assert targets.keys() == sources.keys(), sorted(targets.keys() ^ sources.keys())
    for name, target in targets.items():
        value = local_tensor(sources[name])
        if value.shape != target.shape:  # all experts were read
            start = first[id(target)]
            value = value[start : start + len(target)].clone()
        if (value.dtype, value.device) == (target.dtype, target.device):
            target.data = value
        else:
            target.data.copy_(value)


def _left_out(files: PublishedDirectory, loaded: Any, unexpected: Iterable[str]) -> list[str]:
    """Describe the tensors of the files that the model's class leaves out.

    Those that it knows, such as MTP layers (`_keys_to_ignore_on_load_unexpected`), and any other,
    such as layers beyond those of config.json.
    """
    patterns = getattr(loaded, "_keys_to_ignore_on_load_unexpected", None) or []
    names = [n for n in files.tensors if any(re.search(p, n) for p in patterns)]
    names = sorted({*names, *unexpected})
    if not names:
        return []
    return [
        f"not trained, because transformers does not build them: {len(names)} tensors of "
        f"model.source, such as {names[0]}"
    ]


def _dtype(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters())
