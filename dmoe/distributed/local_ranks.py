"""Real gloo ranks on this machine, for `dmoe verify` and the tests: N processes, one function, N results or the first error.

A fork server that has imported torch once starts a rank in a tenth of a second, where a fresh interpreter takes three.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.nn.parallel",
    "accelerate",
    "accelerate.tracking",
]
"""What costs a second or more to import (device meshes import torch._dynamo): paid once, by the fork server."""


class RankError(RuntimeError):
    """A rank raised, died, or did not answer in time; the message holds its traceback."""


@dataclass(frozen=True)
class _Rank:
    process: ForkServerProcess
    results: Connection


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: object, timeout: float = 60.0
) -> list[Any]:
    """`[function(rank, world, *args) for rank in range(world)]`, each in a process of its own, joined by gloo.

    `function` must be importable by name, its arguments and result picklable, and without tensors: torch would pass on a
    descriptor of memory that ends with the rank; give numpy arrays. The group's time-out is `timeout` too. One CPU
    thread a rank. Nothing is left running, whatever happens.

    Raises:
        RankError: the first rank that failed, or that the time is over.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _start(context, Path(folder) / "store", rank, world_size, timeout, function, args)
            for rank in range(world_size)
        ]
        try:
            return _collect(ranks, time.monotonic() + timeout)
        finally:
            for rank in ranks:
                rank.process.kill()
                rank.process.join()
                rank.results.close()


def _start(
    context: ForkServerContext,
    store: Path,
    rank: int,
    world: int,
    timeout: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> _Rank:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_run, args=(sender, store, rank, world, timeout, function, args), daemon=True
    )
    process.start()
    sender.close()  # so that a rank that dies is an end of file here
    return _Rank(process, receiver)


def _collect(ranks: list[_Rank], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    numbers = {id(rank.results): number for number, rank in enumerate(ranks)}
    pending = [rank.results for rank in ranks]
    while pending:
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(
                f"ranks {sorted(numbers[id(c)] for c in pending)} did not answer in time"
            )
        for connection in ready:
            assert isinstance(connection, Connection)
            number = numbers[id(connection)]
            try:
                failed, value = connection.recv()
            except EOFError:
                ranks[number].process.join()
                raise RankError(
                    f"rank {number} died with exit code {ranks[number].process.exitcode}"
                ) from None
            if failed:
                raise RankError(f"rank {number} failed:\n{value}")
            results[number] = value
            pending.remove(connection)
    return [results[number] for number in range(len(ranks))]


def _run(
    sender: Connection,
    store: Path,
    rank: int,
    world: int,
    timeout: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import FileStore

    torch.set_num_threads(1)
    gc.freeze()  # what the imports left stays: each full collection walked it again, a fifth of a rank's time in `dmoe verify`
    limit = timedelta(seconds=timeout)
    try:
        if world > 1:  # what torchrun would set: accelerate reads it
            here, size = str(rank), str(world)
            os.environ.update(
                RANK=here,
                WORLD_SIZE=size,
                LOCAL_RANK=here,
                LOCAL_WORLD_SIZE=size,
                OMP_NUM_THREADS="1",
            )
            dist.init_process_group(
                "gloo",
                store=FileStore(str(store), world),
                rank=rank,
                world_size=world,
                timeout=limit,
            )
        value = function(rank, world, *args)
        if world > 1:
            dist.barrier()  # a rank that leaves early closes sockets its peers still use
            dist.destroy_process_group()
        sender.send((False, value))
    except BaseException:
        sender.send((True, traceback.format_exc()))
        raise SystemExit(1) from None
