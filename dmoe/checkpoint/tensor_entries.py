"""What may be saved: a name to a tensor, and nothing that would need pickle or lose a value on the way through safetensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dmoe.checkpoint.manifest import Manifest, TensorEntry
from dmoe.config.errors import CheckpointError

# Types that safetensors and torch both write and read back exactly, by the name each gives them in a file's header.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def describe_tensors(state: Mapping[str, object]) -> dict[str, TensorEntry]:
    """Global shape and dtype of every tensor, by name, sorted; refuses what cannot come back exactly.

    Raises: CheckpointError naming the tensor: no tensor at all (torch would pickle it), a meta or sparse one, a dtype outside
    `DTYPES`, a partial DTensor, or a name that safetensors keeps for itself.
    """
    return {name: _describe_one(name, state[name]) for name in sorted(state, key=_checked_name)}


def check_matches(manifest: Manifest, state: Mapping[str, object], prefix: str | tuple[str, ...]) -> None:
    """Refuse a `state` that differs from the manifest's tensors starting with `prefix` in a name, a shape or a dtype.

    Raises: CheckpointError naming the first such tensor and how many names are missing or extra.
    """
    wanted = describe_tensors(state)
    saved = {name: entry for name, entry in manifest.tensors.items() if name.startswith(prefix)}
    if not saved:
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} holds no tensor that starts with {prefix!r}"
        )
    missing, extra = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {missing[0]!r} ({len(missing)} names that this run has and it has not)"
        )
    if extra:
        raise CheckpointError(
            f"the checkpoint also holds {extra[0]!r} ({len(extra)} names that this run does not have)"
        )
    for name, entry in saved.items():
        if entry != wanted[name]:
            raise CheckpointError(
                f"{name!r} is {_spell(entry)} in the checkpoint and {_spell(wanted[name])} in this run"
            )


def local_tensor(tensor: Tensor) -> Tensor:
    """The plain tensor that this rank holds: of a DTensor its local shard, detached."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _describe_one(name: str, tensor: object) -> TensorEntry:
    if not isinstance(tensor, Tensor):
        raise CheckpointError(
            f"{name!r} is a {type(tensor).__name__}, not a tensor: plain values belong into extra"
        )
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise CheckpointError(
            f"{name!r} is a meta, sparse or quantized tensor: only dense tensors with data can be stored"
        )
    if isinstance(tensor, DTensor) and any(
        placement.is_partial() for placement in tensor.placements
    ):
        raise CheckpointError(f"{name!r} is a partial DTensor: reduce it first")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES.values():
        raise CheckpointError(
            f"{name!r} is {dtype}: a checkpoint holds {', '.join(sorted(DTYPES.values()))}"
        )
    return TensorEntry(tuple(tensor.shape), dtype)


def _checked_name(name: object) -> str:
    if not isinstance(name, str) or not name or name == "__metadata__" or not name.isprintable():
        raise CheckpointError(
            f"{name!r} cannot name a tensor: printable text is wanted, and not __metadata__"
        )
    return name


def _spell(entry: TensorEntry) -> str:
    return f"{entry.dtype}{list(entry.shape)}"
