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
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.config.published import DEQUANTIZED, quantization_of, source_directory
from dmoe.distributed.expert_parallel import expert_group_of, stacks_over_ranks
from dmoe.distributed.gradients import local_tensor
from dmoe.hf.adapters import has_unread_rows, trimmed_class
from dmoe.hf.lora import is_lora
from dmoe.hf.moefy import find_blocks, moefied_layers
from dmoe.hf.published import PublishedDirectory
from dmoe.hf.transformers_log import quiet


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
    notes: list[str] = []
    extra: dict[str, Any] = {}
    method = quantization_of(source)
    if method is not None:
        import transformers

        extra["quantization_config"] = getattr(transformers, DEQUANTIZED[method])(dequantize=True)
        notes.append(f"model.source is quantised ({method}): read as {_dtype(model)}")
    kind, group = cast(Any, type(model)), expert_group_of(moefied_layers(model)[0])
    unread = has_unread_rows(model, tensor_names(directory))
    group = None if method or unread else group
    kind = kind if unread else trimmed_class(kind)
    if group is not None and hasattr(kind, "maybe_distribute_model"):
        kind, more = _reading_own_experts(kind, group)
        extra |= more
    try:
        with quiet():
            loaded, info = kind.from_pretrained(
                directory,
                dtype=_dtype(model),
                attn_implementation=cast(Any, model).config._attn_implementation,
                experts_implementation="eager",
                output_loading_info=True,
                use_safetensors=True,
                **extra,
            )
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        allowed = f"cannot be read: {type(error).__name__}: {said}"
        raise ConfigError("model.source", source, allowed, "check its files") from error
    missing = sorted(info["missing_keys"])
    if missing:
        allowed = f"lacks {len(missing)} tensors of the model, such as {missing[0]}"
        raise ConfigError("model.source", source, allowed, "download it again")
    _restore(loaded, directory)
    _copy(model, loaded)
    return notes + _left_out(directory, loaded)


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


def _restore(loaded: nn.Module, directory: Path) -> None:
    """Read the biases of ZAYA's choice again: transformers 5.23 sets their last number to -1."""
    for name, buffer in loaded.named_buffers():
        if name.endswith(".balancing_biases"):
            buffer.copy_(PublishedDirectory(directory).read(name))


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


def _left_out(directory: Path, loaded: Any) -> list[str]:
    """Describe the tensors of the files that the model's class leaves out, such as MTP layers."""
    patterns = getattr(loaded, "_keys_to_ignore_on_load_unexpected", None) or []
    names = [n for n in tensor_names(directory) if any(re.search(p, n) for p in patterns)]
    if not names:
        return []
    return [
        f"not trained, because transformers does not build them: {len(names)} tensors of "
        f"model.source, such as {names[0]}"
    ]


def tensor_names(directory: Path) -> list[str]:
    """Return the names of all tensors in the files, from their headers."""
    from safetensors import safe_open

    names: list[str] = []
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names += opened.keys()
    return sorted(names)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters())
