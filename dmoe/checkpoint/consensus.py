"""Agreement between ranks: an error on one rank is raised on all, and replicas must be equal.

W = ranks of the group, n = tensors of the state.

Errors: the body of `all_or_none` runs on each rank by itself and ends with an all-reduce of a flag,
so that no rank waits for another that gave up. The body may contain a collective only if that
collective runs on every rank in any case (torch's DCP does: it sends exceptions to all ranks).

Replicas: torch's DCP writes one rank's value where several ranks hold the same part, without
looking at the others. Given different experts as plain tensors of one name, it keeps one rank's and
drops the rest, and the file loads without an error: Megatron-LM#5844, #6858, DeepSpeed#6589, #8147,
megablocks#160. So each rank sends (position, fingerprint) of each part, and parts at the same
position must have the same fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from dmoe.checkpoint.manifest import TensorEntry
from dmoe.checkpoint.validate import local_tensor
from dmoe.config.errors import CheckpointError

_MESSAGE_BYTES = 400  # of the first failing rank's message, sent to the others
_CHUNK_WORDS = 1 << 20  # int64 words per hashing step: limits the extra memory to 16 MiB


class RankGroup:
    """The ranks of a process group (None: all), or rank 0 of 1 without torch.distributed."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if self.distributed else 0
        self.size = dist.get_world_size(group) if self.distributed else 1
        assert self.rank >= 0, "this rank is not in the group that saves or loads"

    @contextmanager
    def all_or_none(self, action: str) -> Iterator[None]:
        """Run the body; raise CheckpointError on every rank if it failed on any.

        `action` names the body in the message. Cost: 1 all-reduce of 4 bytes.
        """
        error: BaseException | None = None
        try:
            yield
        # torch's CheckpointException is not an Exception.
        except (Exception, CheckpointException) as caught:
            error = caught
        self._raise_if_any_failed(action, error)

    def gather(self, row: Tensor) -> Tensor:
        """Stack every rank's `row` [n], same dtype, as [W, n] on the CPU. Cost: 1 all-gather."""
        row = row.reshape(1, -1)
        if self.size == 1:
            return row.cpu()
        device = self._device()
        rows = [torch.empty_like(row, device=device) for _ in range(self.size)]
        dist.all_gather(rows, row.to(device).contiguous(), group=self.group)
        return torch.cat(rows).cpu()

    def broadcast_from_rank0(self, number: int) -> int:
        """Return rank 0's `number` on every rank. Cost: 1 all-gather of 8 bytes."""
        return int(self.gather(torch.tensor([number], dtype=torch.int64))[0, 0])

    def _raise_if_any_failed(self, action: str, error: BaseException | None) -> None:
        if self.size == 1:
            failed = error is not None
        else:
            flag = torch.tensor([error is not None], dtype=torch.int32, device=self._device())
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
            failed = bool(flag.item())
        if not failed:
            return
        messages = self._gather_messages(_message(error) if error is not None else "")
        first = next(rank for rank, message in enumerate(messages) if message)
        # torch's DCP raises one rank's exception on every rank, and knows which rank it was.
        failed_rank = min(error.failures) if isinstance(error, CheckpointException) else first
        where = f" on rank {failed_rank}" if self.size > 1 else ""
        raise CheckpointError(f"{action} failed{where}: {messages[first]}") from error

    def _gather_messages(self, message: str) -> list[str]:
        row = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
        encoded = message.encode(errors="replace")[:_MESSAGE_BYTES]
        row[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
        return [
            bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in self.gather(row)
        ]

    def _device(self) -> torch.device:
        """Device of this group's collectives: the CPU if a back-end supports it, else the GPU."""
        if "cpu" in str(dist.get_backend_config(self.group)):
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())


def _message(error: BaseException) -> str:
    # Of the ranks' exceptions, the first rank's: the others only repeat it.
    if isinstance(error, CheckpointException):
        error = error.failures[min(error.failures)][0]
    if isinstance(error, CheckpointError):
        return str(error) or "no reason given"
    return f"{type(error).__name__}: {error}".replace("\n", " ")


def check_replicas(
    ranks: RankGroup, state: Mapping[str, Tensor], entries: Mapping[str, TensorEntry]
) -> None:
    """Refuse a state whose names, shapes, dtypes or replicated values differ between ranks.

    `entries` is `describe_tensors(state)`.

    Raises:
        CheckpointError: on every rank alike, with the tensor and two ranks.

    Cost: 2 all-gathers (32 bytes, 16 n bytes per rank); one pass over the local tensors on their
    own device.
    """
    if ranks.size == 1:
        return
    digests = ranks.gather(_digest(entries))
    for rank in range(1, ranks.size):
        if not torch.equal(digests[rank], digests[0]):
            raise CheckpointError(
                f"ranks 0 and {rank} hold tensors of different names, global shapes or dtypes"
            )
    rows = torch.zeros(len(entries), 2, dtype=torch.int64)
    # A rank that runs out of memory here must not leave the others in the gather.
    with ranks.all_or_none("fingerprinting the tensors"):
        rows = torch.tensor(
            [[_position(state[name]), fingerprint(state[name])] for name in entries],
            dtype=torch.int64,
        )
    table = ranks.gather(rows).reshape(ranks.size, len(entries), 2).tolist()
    for column, name in enumerate(entries):
        _check_equal(name, [tuple(table[rank][column]) for rank in range(ranks.size)])


def fingerprint(tensor: Tensor) -> int:
    """Compute a 64-bit position-weighted sum over the bytes of this rank's part.

    A change of any single 8-byte word changes it. Not cryptographic: it is only compared between
    the ranks of one run. Extra memory: 16 MiB on the tensor's device.
    """
    data = local_tensor(tensor).contiguous().reshape(-1).view(torch.uint8)
    num_words = min(_CHUNK_WORDS, data.numel() // 8 + 1)
    odd = torch.arange(num_words, dtype=torch.int64, device=data.device).mul_(2).add_(1)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for chunk in data.split(8 * _CHUNK_WORDS):
        words = torch.zeros((chunk.numel() + 7) // 8, dtype=torch.int64, device=data.device)
        words.view(torch.uint8)[: chunk.numel()].copy_(chunk)
        total.mul_(1_000_003).add_(words.mul_(odd[: words.numel()]).sum())
    return int(total.item())


def _check_equal(name: str, parts: list[tuple[int, ...]]) -> None:
    """Compare (position, fingerprint) of one tensor on all ranks."""
    first_rank: dict[int, int] = {}
    for rank, (position, _) in enumerate(parts):
        other = first_rank.setdefault(position, rank)
        if position >= 0 and parts[other] != parts[rank]:
            raise CheckpointError(
                f"{name!r} differs between ranks {other} and {rank}, which should hold equal"
                " copies: a sharded tensor must be given as a DTensor"
            )


def _position(tensor: Tensor) -> int:
    """Flat index, in the global tensor, of this rank's first element; -1 if it has none."""
    if local_tensor(tensor).numel() == 0:
        return -1
    if not isinstance(tensor, DTensor):
        return 0
    position = 0
    for size, offset in zip(tensor.shape, tensor.__create_chunk_list__()[0].offsets, strict=True):
        position = position * size + offset
    return position


def _digest(entries: Mapping[str, TensorEntry]) -> Tensor:
    text = repr([(name, entry.shape, entry.dtype) for name, entry in entries.items()])
    return torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
