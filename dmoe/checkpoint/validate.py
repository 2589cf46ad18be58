"""Validation of a state before saving, and of a checkpoint's safetensors files by their headers.

A state maps names to tensors; nothing in it may need pickle or lose a value in safetensors.

A file `shard-00001-model-00001-of-00001.safetensors` was written by rank 0 (torch counts from 1).
Its header has, for each tensor, the shape and dtype of the chunk in this file and its offset in
the global tensor. Together the files must hold every tensor of the manifest completely. torch's
reader never checks that: where a shard is missing it leaves the rows as they were, or takes the
tensor for smaller.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from dmoe.checkpoint.manifest import Manifest, TensorEntry
from dmoe.config.errors import CheckpointError

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
"""safetensors name -> torch name of the dtypes that both write and read back exactly."""

_OFFSETS_KEY = "DCP_SHARDING_INFO"  # header key of torch's chunk offsets, as JSON

ChunkSizes = dict[str, dict[tuple[int, ...], int]]
"""Tensor name -> offset of a chunk -> its number of elements."""


def describe_tensors(state: Mapping[str, object]) -> dict[str, TensorEntry]:
    """Describe every tensor by global shape and dtype; names sorted.

    Raises:
        CheckpointError: names the tensor that could not be restored exactly: not a tensor (torch
            would pickle it), a meta or sparse one, a dtype outside `DTYPES`, a partial DTensor, or
            a name that safetensors reserves.
    """
    return {name: _describe(name, state[name]) for name in sorted(state, key=_checked_name)}


def check_matches(
    manifest: Manifest, state: Mapping[str, object], prefix: str | tuple[str, ...]
) -> None:
    """Refuse a `state` that differs from the manifest's tensors whose names start with `prefix`.

    Raises:
        CheckpointError: with the first tensor that differs in name, shape or dtype, and the number
            of missing or extra names.
    """
    wanted = describe_tensors(state)
    saved = {name: entry for name, entry in manifest.tensors.items() if name.startswith(prefix)}
    if not saved:
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} has no tensor that starts with {prefix!r}"
        )
    missing, extra = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {missing[0]!r} ({len(missing)} names of this run are missing)"
        )
    if extra:
        raise CheckpointError(
            f"the checkpoint also holds {extra[0]!r} ({len(extra)} names are not in this run)"
        )
    for name, entry in saved.items():
        if entry != wanted[name]:
            raise CheckpointError(
                f"{name!r} is {_format(entry)} in the checkpoint and {_format(wanted[name])} in"
                " this run"
            )


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the plain tensor that this rank holds, detached: of a DTensor the local shard."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _describe(name: str, tensor: object) -> TensorEntry:
    if not isinstance(tensor, Tensor):
        kind = type(tensor).__name__
        raise CheckpointError(f"{name!r} is a {kind}, not a tensor: plain values belong in extra")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise CheckpointError(
            f"{name!r} is a meta, sparse or quantized tensor: only dense tensors with data can be"
            " stored"
        )
    if isinstance(tensor, DTensor) and any(p.is_partial() for p in tensor.placements):
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
            f"{name!r} cannot name a tensor: use printable text other than __metadata__"
        )
    return name


def _format(entry: TensorEntry) -> str:
    return f"{entry.dtype}{list(entry.shape)}"


def shard_path(directory: Path, rank: int) -> Path | None:
    """Find the file that `rank` wrote; None if DCP's plan gave it nothing to write."""
    found = list(directory.glob(f"shard-{rank + 1:05d}-model-*.safetensors"))
    assert len(found) <= 1, f"rank {rank} wrote {len(found)} files"
    return found[0] if found else None


def check_shards(directory: Path, files: Iterable[str], tensors: Mapping[str, TensorEntry]) -> None:
    """Refuse files whose headers do not add up to exactly `tensors`. Reads the headers only.

    Raises:
        CheckpointError: with the file or the tensor: malformed header, unknown tensor, other dtype,
            a chunk outside the tensor, a chunk twice, missing elements.
    """
    chunks: ChunkSizes = {name: {} for name in tensors}
    for name in sorted(files):
        _add_file(directory / name, tensors, chunks)
    for name, entry in tensors.items():
        if not chunks[name]:
            raise CheckpointError(f"no file of {directory} holds {name!r}")
        held, total = sum(chunks[name].values()), prod(entry.shape)
        if held != total:
            raise CheckpointError(
                f"the files of {directory} hold {held} of the {total} elements of {name!r}"
            )


def _add_file(path: Path, tensors: Mapping[str, TensorEntry], chunks: ChunkSizes) -> None:
    try:
        with safe_open(str(path), framework="pt") as file:
            offsets = json.loads((file.metadata() or {})[_OFFSETS_KEY])
            for name in file.keys():  # noqa: SIM118 (safe_open cannot be iterated)
                data = file.get_slice(name)
                dtype = data.get_dtype()
                found = TensorEntry(tuple(data.get_shape()), DTYPES.get(dtype, dtype))
                _add_chunk(name, tensors[name], found, offsets[name]["saved_offsets"], chunks[name])
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    # A malformed header can make the parsers raise anything; safetensors has its own error type.
    except Exception as error:
        raise CheckpointError(
            f"{path} has no valid header: {type(error).__name__}: {error}"
        ) from None


def _add_chunk(
    name: str,
    full: TensorEntry,
    chunk: TensorEntry,
    offset: list[int],
    sizes: dict[tuple[int, ...], int],
) -> None:
    """Check one chunk of the tensor `full` and record its number of elements in `sizes`."""
    if chunk.dtype != full.dtype:
        raise CheckpointError(f"{name!r} is {chunk.dtype} here and {full.dtype} in the manifest")
    shape = list(chunk.shape)
    inside = len(offset) == len(shape) == len(full.shape)
    for start, size, limit in zip(offset, shape, full.shape, strict=False):
        inside = inside and type(start) is int and start >= 0 and start + size <= limit
    if not inside:
        raise CheckpointError(
            f"{name!r} has a chunk {shape} at {offset}, outside its shape {list(full.shape)}"
        )
    if prod(shape) and sizes.get(tuple(offset)):
        raise CheckpointError(f"{name!r} has the chunk at {offset} twice")
    sizes[tuple(offset)] = max(prod(shape), sizes.get(tuple(offset), 0))
