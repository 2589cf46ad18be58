"""Proof, before anything is written, that what will be written once is equal wherever it is held.

n = tensors of the state; W = ranks. torch's DCP writes one rank's value where several hold the same piece, without looking
at the others. Given different experts as plain tensors of one name it keeps one rank's and drops the rest, and the file
loads without an error: Megatron-LM#5844, #6858, DeepSpeed#6589, #8147, megablocks#160 are all that bug. A replica that has
drifted is as bad. So each rank sends (place, fingerprint) of each piece, and equal places must have equal fingerprints.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dmoe.config.errors import CheckpointError
from dmoe.distributed.checkpoint.agree import RankGroup
from dmoe.distributed.checkpoint.manifest import TensorEntry
from dmoe.distributed.checkpoint.state import local_part

__all__ = ["check_replicas", "fingerprint"]

_WORDS = 1 << 20  # int64 words hashed at a time: bounds the extra memory to 16 MiB


def check_replicas(ranks: RankGroup, state: Mapping[str, Tensor], contents: Mapping[str, TensorEntry]) -> None:
    """Refuse, on every rank, a state whose names, shapes, dtypes or replicated values differ between ranks.

    contents: `describe(state)`.
    Raises: CheckpointError on every rank alike, naming the tensor and two ranks.
    Cost: 2 all-gathers (32 bytes, 16 n bytes a rank); one pass over the local tensors on their own device.
    """
    if ranks.world == 1:
        return
    digests = ranks.gather(_digest(contents))
    for rank in range(1, ranks.world):
        if not torch.equal(digests[rank], digests[0]):
            raise CheckpointError(f"ranks 0 and {rank} hold tensors of different names, global shapes or dtypes")
    rows = torch.zeros(len(contents), 2, dtype=torch.int64)
    with ranks.all_or_none("fingerprinting the tensors"):  # a rank out of memory here must not leave the others in the gather
        rows = torch.tensor([[_place(state[name]), fingerprint(state[name])] for name in contents], dtype=torch.int64)
    table = ranks.gather(rows).reshape(ranks.world, len(contents), 2).tolist()
    for column, name in enumerate(contents):
        _check_one(name, [tuple(table[rank][column]) for rank in range(ranks.world)])


def fingerprint(tensor: Tensor) -> int:
    """A 64-bit sum over the bytes of this rank's part, weighted by position: any change of one 8-byte word changes it.

    Not cryptographic; it is compared between ranks of one run only. Extra memory: 16 MiB on the tensor's device.
    """
    data = local_part(tensor).contiguous().reshape(-1).view(torch.uint8)
    odd = torch.arange(min(_WORDS, data.numel() // 8 + 1), dtype=torch.int64, device=data.device).mul_(2).add_(1)
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
    if local_part(tensor).numel() == 0:
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
