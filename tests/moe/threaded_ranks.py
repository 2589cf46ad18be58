"""Several ranks in one process, one thread each, fast enough for property tests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from dmoe.moe.interfaces import DataParallelComm
from dmoe.moe.routing import Routing

Result = TypeVar("Result")


class ThreadComm:
    """`DataParallelComm` of one thread; counts its collectives."""

    def __init__(self, rank: int, parts: list[Tensor], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.averages = rank, len(parts), False
        self.parts, self.barrier = parts, barrier
        self.collectives = 0

    def gather(self, value: Tensor) -> Tensor:
        self.collectives += 1
        self.parts[self.rank] = value.detach()
        self.barrier.wait()
        gathered = torch.stack(
            list(self.parts)
        )  # refuses unequal shapes, where a real gather would hang
        self.barrier.wait()
        return gathered

    def sum(self, value: Tensor) -> Tensor:
        return self.gather(value).sum(0)


def run_threads(world: int, function: Callable[[DataParallelComm], Result]) -> list[Result]:
    """Run `function(comm)` on every rank at the same time; return the results by rank."""
    barrier, parts = threading.Barrier(world, timeout=30), [torch.empty(0)] * world

    def one(rank: int) -> Result:
        try:
            return function(ThreadComm(rank, parts, barrier))
        except BaseException:
            barrier.abort()  # the others must not wait for it
            raise

    with ThreadPoolExecutor(world) as threads:
        futures = [threads.submit(one, rank) for rank in range(world)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures]


def split_over_ranks(routing: Routing, ranks: int) -> list[Routing]:
    """Split the tokens over `ranks` ranks, in order."""
    per_rank = len(routing.expert_TK) // ranks

    def rows(value: Tensor | None, rank: int) -> Tensor | None:
        return None if value is None else value[rank * per_rank : (rank + 1) * per_rank]

    names = (
        "expert_TK",
        "weight_TK",
        "score_TE",
        "logit_TE",
        "selected_TK",
        "next_expert_TS",
        "next_weight_TS",
    )
    return [
        replace(routing, **{name: rows(getattr(routing, name), rank) for name in names})
        for rank in range(ranks)
    ]
