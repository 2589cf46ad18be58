"""The safetensors files of a checkpoint, by their headers: together they must hold every tensor of the manifest, whole.

A file `shard-00001-model-00001-of-00001.safetensors` is what rank 0 wrote (torch counts from one). Its header gives, for each
tensor, the piece's shape, dtype and offset in the global tensor. torch's reader never compares the pieces with the whole:
where a shard is lacking it leaves the rows as they were, or takes the tensor for smaller.

Proof, before anything is written, that what will be written once is equal wherever it is held.

n = tensors of the state; W = ranks. torch's DCP writes one rank's value where several hold the same piece, without looking
at the others. Given different experts as plain tensors of one name it keeps one rank's and drops the rest, and the file
loads without an error: Megatron-LM#5844, #6858, DeepSpeed#6589, #8147, megablocks#160 are all that bug. A replica that has
drifted is as bad. So each rank sends (place, fingerprint) of each piece, and equal places must have equal fingerprints.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from dmoe.checkpoint.consensus import RankGroup
from dmoe.checkpoint.manifest import TensorEntry
from dmoe.checkpoint.tensor_entries import DTYPES, local_tensor
from dmoe.config.errors import CheckpointError

_OFFSETS = "DCP_SHARDING_INFO"  # the header's key under which torch keeps the offsets, as JSON

Pieces = dict[str, dict[tuple[int, ...], int]]  # tensor -> offset of a piece -> its elements


def shard_path(directory: Path, rank: int) -> Path | None:
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
            raise CheckpointError(
                f"the files of {directory} hold {held} of the {prod(entry.shape)} elements of {name!r}"
            )


def _add_file(path: Path, tensors: Mapping[str, TensorEntry], pieces: Pieces) -> None:
    try:
        with safe_open(str(path), framework="pt") as file:
            offsets = json.loads((file.metadata() or {})[_OFFSETS])
            for name in file.keys():  # noqa: SIM118 (no mapping: safe_open cannot be iterated)
                piece = file.get_slice(name)
                offset = offsets[name]["saved_offsets"]
                _add_piece(
                    name, tensors[name], piece.get_dtype(), piece.get_shape(), offset, pieces[name]
                )
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # whatever a malformed header makes the parsers raise: safetensors has an error type of its own
        raise CheckpointError(
            f"{path} has no header of this program: {type(error).__name__}: {error}"
        ) from None


def _add_piece(
    name: str,
    whole: TensorEntry,
    dtype: str,
    shape: list[int],
    offset: list[int],
    seen: dict[tuple[int, ...], int],
) -> None:
    if DTYPES.get(dtype) != whole.dtype:
        raise CheckpointError(f"{name!r} is {dtype} here and {whole.dtype} in the manifest")
    inside = len(offset) == len(shape) == len(whole.shape)
    for start, size, limit in zip(offset, shape, whole.shape, strict=False):
        inside = inside and type(start) is int and start >= 0 and start + size <= limit
    if not inside:
        raise CheckpointError(
            f"{name!r} has a piece {shape} at {offset}, outside its shape {list(whole.shape)}"
        )
    if prod(shape) and seen.get(tuple(offset)):
        raise CheckpointError(f"{name!r} has the piece at {offset} twice")
    seen[tuple(offset)] = max(prod(shape), seen.get(tuple(offset), 0))


_WORDS = 1 << 20  # int64 words hashed at a time: bounds the extra memory to 16 MiB


def check_replicas(
    ranks: RankGroup, state: Mapping[str, Tensor], contents: Mapping[str, TensorEntry]
) -> None:
    """Refuse, on every rank, a state whose names, shapes, dtypes or replicated values differ between ranks.

    contents: `describe(state)`.
    Raises: CheckpointError on every rank alike, naming the tensor and two ranks.
    Cost: 2 all-gathers (32 bytes, 16 n bytes a rank); one pass over the local tensors on their own device.
    """
    if ranks.size == 1:
        return
    digests = ranks.gather(_digest(contents))
    for rank in range(1, ranks.size):
        if not torch.equal(digests[rank], digests[0]):
            raise CheckpointError(
                f"ranks 0 and {rank} hold tensors of different names, global shapes or dtypes"
            )
    rows = torch.zeros(len(contents), 2, dtype=torch.int64)
    with ranks.all_or_none(
        "fingerprinting the tensors"
    ):  # a rank out of memory here must not leave the others in the gather
        rows = torch.tensor(
            [[_place(state[name]), fingerprint(state[name])] for name in contents],
            dtype=torch.int64,
        )
    table = ranks.gather(rows).reshape(ranks.size, len(contents), 2).tolist()
    for column, name in enumerate(contents):
        _check_one(name, [tuple(table[rank][column]) for rank in range(ranks.size)])


def fingerprint(tensor: Tensor) -> int:
    """A 64-bit sum over the bytes of this rank's part, weighted by position: any change of one 8-byte word changes it.

    Not cryptographic; it is compared between ranks of one run only. Extra memory: 16 MiB on the tensor's device.
    """
    data = local_tensor(tensor).contiguous().reshape(-1).view(torch.uint8)
    odd = (
        torch.arange(min(_WORDS, data.numel() // 8 + 1), dtype=torch.int64, device=data.device)
        .mul_(2)
        .add_(1)
    )
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for chunk in data.split(8 * _WORDS):
        words = torch.zeros((chunk.numel() + 7) // 8, dtype=torch.int64, device=data.device)
        words.view(torch.uint8)[: chunk.numel()].copy_(chunk)
        total.mul_(1_000_003).add_(words.mul_(odd[: words.numel()]).sum())
    return int(total.item())


def _check_one(name: str, pieces: list[tuple[int, ...]]) -> None:
    first: dict[int, int] = {}
    for rank, (place, _) in enumerate(pieces):
        holder = first.setdefault(place, rank)
        if place >= 0 and pieces[holder] != pieces[rank]:
            raise CheckpointError(
                f"{name!r} differs between ranks {holder} and {rank}, which should hold equal copies: a sharded tensor must be"
                " given as a DTensor"
            )


def _place(tensor: Tensor) -> int:
    """The index, in the global tensor, of the first element of this rank's part; -1 where it has none."""
    if local_tensor(tensor).numel() == 0:
        return -1
    if not isinstance(tensor, DTensor):
        return 0
    place = 0
    for size, offset in zip(tensor.shape, tensor.__create_chunk_list__()[0].offsets, strict=True):
        place = place * size + offset
    return place


def _digest(contents: Mapping[str, TensorEntry]) -> Tensor:
    text = repr([(name, entry.shape, entry.dtype) for name, entry in contents.items()])
    return torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
