"""The safetensors files of a checkpoint, by their headers: together they must hold every tensor of the manifest, whole.

A file `shard-00001-model-00001-of-00001.safetensors` is what rank 0 wrote (torch counts from one). Its header gives, for each
tensor, the piece's shape, dtype and offset in the global tensor. torch's reader never compares the pieces with the whole:
where a shard is lacking it leaves the rows as they were, or takes the tensor for smaller.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

from safetensors import safe_open

from dmoe.config.errors import CheckpointError
from dmoe.distributed.checkpoint.manifest import TensorEntry
from dmoe.distributed.checkpoint.state import DTYPES

__all__ = ["check_shards", "shard_of"]

_OFFSETS = "DCP_SHARDING_INFO"  # the header's key under which torch keeps the offsets, as JSON

Pieces = dict[str, dict[tuple[int, ...], int]]  # tensor -> offset of a piece -> its elements


def shard_of(directory: Path, rank: int) -> Path | None:
    """The file that `rank` wrote, or None where the plan gave it nothing to write."""
    found = list(directory.glob(f"shard-{rank + 1:05d}-model-*.safetensors"))
    assert len(found) <= 1, f"rank {rank} wrote {len(found)} files"
    return found[0] if found else None


def check_shards(directory: Path, files: Iterable[str], tensors: Mapping[str, TensorEntry]) -> None:
    """Refuse files whose headers do not add up to exactly `tensors`.

    Raises: CheckpointError naming the file or the tensor: malformed header, unknown tensor, other dtype, a piece outside the
    tensor, a piece twice, elements lacking. Cost: reads the headers only.
    """
    pieces: Pieces = {name: {} for name in tensors}
    for name in sorted(files):
        _add_file(directory / name, tensors, pieces)
    for name, entry in tensors.items():
        if not pieces[name]:
            raise CheckpointError(f"no file of {directory} holds {name!r}")
        held = sum(pieces[name].values())
        if held != prod(entry.shape):
            raise CheckpointError(f"the files of {directory} hold {held} of the {prod(entry.shape)} elements of {name!r}")


def _add_file(path: Path, tensors: Mapping[str, TensorEntry], pieces: Pieces) -> None:
    try:
        with safe_open(str(path), framework="pt") as file:
            offsets = json.loads((file.metadata() or {})[_OFFSETS])
            for name in file.keys():  # noqa: SIM118 (no mapping: safe_open cannot be iterated)
                piece = file.get_slice(name)
                offset = offsets[name]["saved_offsets"]
                _add_piece(name, tensors[name], piece.get_dtype(), piece.get_shape(), offset, pieces[name])
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # whatever a malformed header makes the parsers raise: safetensors has an error type of its own
        raise CheckpointError(f"{path} has no header of this program: {type(error).__name__}: {error}") from None


def _add_piece(
    name: str, whole: TensorEntry, dtype: str, shape: list[int], offset: list[int], seen: dict[tuple[int, ...], int]
) -> None:
    if DTYPES.get(dtype) != whole.dtype:
        raise CheckpointError(f"{name!r} is {dtype} here and {whole.dtype} in the manifest")
    inside = len(offset) == len(shape) == len(whole.shape)
    for start, size, limit in zip(offset, shape, whole.shape, strict=False):
        inside = inside and type(start) is int and start >= 0 and start + size <= limit
    if not inside:
        raise CheckpointError(f"{name!r} has a piece {shape} at {offset}, outside its shape {list(whole.shape)}")
    if prod(shape) and seen.get(tuple(offset)):
        raise CheckpointError(f"{name!r} has the piece at {offset} twice")
    seen[tuple(offset)] = max(prod(shape), seen.get(tuple(offset), 0))
