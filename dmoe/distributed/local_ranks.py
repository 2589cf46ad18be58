"""Run a function on N local gloo ranks, for `dmoe verify` and the tests.

A fork server that has imported torch once starts a rank in 0.1 s; a new interpreter needs 3 s.
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
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from dmoe.config.errors import ConfigError
from dmoe.config.launch_env import refuse_debug_detail

PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.nn.parallel",
    "accelerate",
    "accelerate.tracking",
]
"""Slow imports (a second or more; device meshes import torch._dynamo), done by the fork server."""

BLAS_THREADS = "OPENBLAS_NUM_THREADS"
MAX_TEMPDIR = 70
"""Bytes; multiprocessing adds 32 to it (Python 3.11), and the address of a socket has 107."""


class RankError(RuntimeError):
    """A rank raised, died, or did not answer in time; the message holds its traceback."""


@dataclass(frozen=True)
class _Rank:
    process: ForkServerProcess
    results: Connection


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: object,
    timeout: float = 60.0,
    device: str = "cpu",
) -> list[Any]:
    """Run `function(rank, world_size, *args)` on each rank, each in its own process.

    One CPU thread per rank. All processes are gone when this returns or raises.

    Args:
        world_size: number of ranks.
        function: importable by name; arguments and result picklable and without tensors (torch
            would pass on a descriptor of memory that ends with the rank; use numpy arrays).
        args: further arguments of `function`.
        timeout: seconds for everything; also the time-out of the process group.
        device: `cpu`: the ranks use gloo; `cuda`: NCCL, with GPU n for rank n.

    Returns:
        The results in order of rank.

    Raises:
        RankError: of the first rank that failed, or after the time-out.
        ConfigError: the directory for temporary files has too long a path, or a debug level is set
            at which torch's DDP crashes.
    """
    refuse_debug_detail()
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > MAX_TEMPDIR:
        allowed = f"must have at most {MAX_TEMPDIR} bytes: the ranks' sockets are in it"
        raise ConfigError("TMPDIR", folder, allowed, "set it to /tmp")
    context = multiprocessing.get_context("forkserver")
    # Of use for the first function only, whose imports are those of the others, mostly.
    context.set_forkserver_preload([*PRELOAD, function.__module__])
    _start_fork_server()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _start_rank(
                context, (Path(folder) / "store", rank, world_size, timeout, device, function, args)
            )
            for rank in range(world_size)
        ]
        try:
            return _collect_results(ranks, time.monotonic() + timeout)
        finally:
            for rank in ranks:
                rank.process.kill()
                rank.process.join()
                rank.results.close()


def _start_fork_server() -> None:
    """Start the fork server, unless it runs, with one thread for numpy's products.

    OpenBLAS reads the number when it is loaded. With more, each product of a rank waits in a loop
    for threads that the cores have no time for: 380 us in place of 3 for 12,000 numbers.
    """
    given = os.environ.get(BLAS_THREADS)
    os.environ[BLAS_THREADS] = given or "1"
    try:
        forkserver.ensure_running()
    finally:
        if given is None:
            del os.environ[BLAS_THREADS]


def _start_rank(context: ForkServerContext, arguments: tuple[Any, ...]) -> _Rank:
    """Start `_rank_main` with these arguments, after the sender."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_rank_main, args=(sender, *arguments), daemon=True)
    process.start()
    # With the sender closed here, a rank that dies is an end of file on the receiver.
    sender.close()
    return _Rank(process, receiver)


def _collect_results(ranks: list[_Rank], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    rank_of = {id(rank.results): number for number, rank in enumerate(ranks)}
    pending = [rank.results for rank in ranks]
    while pending:
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            silent = sorted(rank_of[id(connection)] for connection in pending)
            raise RankError(f"ranks {silent} did not answer in time")
        for connection in ready:
            assert isinstance(connection, Connection)
            number = rank_of[id(connection)]
            try:
                failed, value = connection.recv()
            except EOFError:
                ranks[number].process.join()
                exit_code = ranks[number].process.exitcode
                raise RankError(f"rank {number} died with exit code {exit_code}") from None
            if failed:
                raise RankError(f"rank {number} failed:\n{value}")
            results[number] = value
            pending.remove(connection)
    return [results[number] for number in range(len(ranks))]


def _rank_main(
    sender: Connection,
    store: Path,
    rank: int,
    world_size: int,
    timeout: float,
    device: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import FileStore

    from dmoe.distributed.init import set_cuda_environment

    torch.set_num_threads(1)
    # Objects of the imports live to the end: without this each full collection visits them again,
    # a fifth of a rank's time in `dmoe verify`.
    gc.freeze()
    limit = timedelta(seconds=timeout)
    try:
        if world_size > 1:
            # The environment that torchrun would set; accelerate reads it.
            os.environ.update(
                RANK=str(rank),
                WORLD_SIZE=str(world_size),
                LOCAL_RANK=str(rank),
                LOCAL_WORLD_SIZE=str(world_size),
                OMP_NUM_THREADS="1",
            )
            gpu = torch.device("cuda", rank) if device == "cuda" else None
            if gpu is not None:
                set_cuda_environment()
                torch.cuda.set_device(gpu)
            dist.init_process_group(
                "gloo" if gpu is None else "nccl",
                store=FileStore(str(store), world_size),
                rank=rank,
                world_size=world_size,
                timeout=limit,
                device_id=gpu,
            )
        value = function(rank, world_size, *args)
        if world_size > 1:
            # A rank that leaves early closes sockets that its peers still use.
            dist.barrier()
            dist.destroy_process_group()
        sender.send((False, value))
    except BaseException:
        sender.send((True, traceback.format_exc()))
        raise SystemExit(1) from None
