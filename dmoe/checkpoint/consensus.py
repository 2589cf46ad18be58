"""One decision for all ranks: whatever fails on one rank is raised on every rank, and nobody waits for a rank that gave up.

W = ranks of the group. A stage's body runs on each rank by itself; its end is one all-reduce of a flag. The body may hold a
collective only if that collective runs on every rank whatever happens (torch's DCP does: it ships exceptions to all ranks).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from dmoe.config.errors import CheckpointError

_TEXT = 400  # bytes of the first failing rank's message that reach the others


class RankGroup:
    """The ranks of a process group (the world if None), or rank 0 of 1 where torch.distributed was not initialised."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if self.distributed else 0
        self.size = dist.get_world_size(group) if self.distributed else 1
        assert self.rank >= 0, "this rank is not in the group that saves or loads"

    @contextmanager
    def all_or_none(self, doing: str) -> Iterator[None]:
        """Run the body, then raise CheckpointError on every rank if it failed on any. Cost: 1 all-reduce of 4 bytes."""
        error: BaseException | None = None
        try:
            yield
        except (
            Exception,
            CheckpointException,
        ) as caught:  # torch's CheckpointException is no Exception
            error = caught
        self._decide(doing, error)

    def gather(self, row: Tensor) -> Tensor:
        """Every rank's `row`, stacked: [n] -> [W, n] on the CPU; same n and dtype everywhere. Cost: 1 all-gather."""
        row = row.reshape(1, -1)
        if self.size == 1:
            return row.cpu()
        device = self._device()
        rows = [torch.empty_like(row, device=device) for _ in range(self.size)]
        dist.all_gather(rows, row.to(device).contiguous(), group=self.group)
        return torch.cat(rows).cpu()

    def broadcast_from_rank0(self, number: int) -> int:
        """Rank 0's `number` on every rank. Cost: 1 all-gather of 8 bytes."""
        return int(self.gather(torch.tensor([number], dtype=torch.int64))[0, 0])

    def _decide(self, doing: str, error: BaseException | None) -> None:
        if self.size == 1:
            failed = error is not None
        else:
            flag = torch.tensor([error is not None], dtype=torch.int32, device=self._device())
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
            failed = bool(flag.item())
        if not failed:
            return
        texts = self._exchange_texts(_message(error) if error is not None else "")
        first = next(rank for rank, text in enumerate(texts) if text)
        # torch's DCP raises on every rank what one of them raised, and knows which.
        culprit = min(error.failures) if isinstance(error, CheckpointException) else first
        where = f" on rank {culprit}" if self.size > 1 else ""
        raise CheckpointError(f"{doing} failed{where}: {texts[first]}") from error

    def _exchange_texts(self, text: str) -> list[str]:
        row = torch.zeros(_TEXT, dtype=torch.uint8)
        encoded = text.encode(errors="replace")[:_TEXT]
        row[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
        return [
            bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in self.gather(row)
        ]

    def _device(self) -> torch.device:
        """Where this group's collectives take their tensors: the CPU if a back-end serves it, else the accelerator."""
        if "cpu" in str(dist.get_backend_config(self.group)):
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())


def _message(error: BaseException) -> str:
    if isinstance(
        error, CheckpointException
    ):  # of the ranks' exceptions, the first rank's: the others are its echo
        error = error.failures[min(error.failures)][0]
    if isinstance(error, CheckpointError):
        return str(error) or "no reason given"
    return f"{type(error).__name__}: {error}".replace("\n", " ")
