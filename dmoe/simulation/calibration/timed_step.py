"""Measurements of one rank for `dmoe plan --calibrate`: steps and matrix products.

Kernels have the names and shapes of the dry run (`recorder.describe`), so that a time measured here
is found again for the same kernel of a step that was never run.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dmoe.config.schema import Config
from dmoe.distributed.init import init_distributed
from dmoe.distributed.link_speed import count_of_rank_0
from dmoe.simulation.recording.kernel import Kernel, describe
from dmoe.simulation.recording.recorder import FREE
from dmoe.train.allocator import keep_freed_memory
from dmoe.train.engine import Engine, build_engine
from dmoe.train.step import train_step, training_batches

WARM_UP = 3
CACHE = 8 << 20
"""Bytes of operands that take turns, so that no product finds its own in the cache."""


class TimedStep(NamedTuple):
    """Measurements of one rank and one config."""

    seconds: list[float]
    """Time of each timed step."""
    kernels: list[tuple[Kernel, float, float]]
    """Each kernel of one step, how often, and its seconds."""
    resident: int
    """Bytes of this process before its model: what is no tensor."""


class OperatorTimer(TorchDispatchMode):
    """Times every operator call of real steps, where each finds in the caches what a step has left.

    Run again later on kept tensors, kernels of memory traffic take up to twice as long.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: defaultdict[Kernel, list[float]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        began = time.perf_counter()
        out = func(*args, **kwargs)
        seconds = time.perf_counter() - began
        space, _, short = func._schema.name.partition("::")
        if space in ("c10d", "prim") or func.is_view or short == "detach" or short in FREE:
            return out
        kernel = describe(short, args, out)
        if kernel.bytes:
            self.found[kernel].append(seconds)
        return out

    def kernels(self, steps: int) -> list[tuple[Kernel, float, float]]:
        """Return each kernel of `steps` steps, how often per step, and its median seconds."""
        return [
            (k, len(every) / steps, statistics.median(every)) for k, every in self.found.items()
        ]


def time_steps(
    rank: int,
    world: int,
    config: Config,
    vocabulary: int,
    threads: int,
    seconds: float,
    plays: int,
) -> TimedStep:
    """Train for some steps on this rank, and time them. Collective.

    One config per process: accelerate's precision cannot change.

    Args:
        rank: of this process.
        world: number of ranks.
        config: to train.
        vocabulary: number of outputs.
        threads: of this rank.
        seconds: for the timed steps, about; at least two.
        plays: steps whose kernels are then timed, one by one; 0: they are not.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    engine = build_engine(config, init_distributed("cpu"), vocabulary)
    data = engine.task.open_data().train
    warm = [_step(engine, data, step) for step in range(WARM_UP)]
    steps = count_of_rank_0(max(2, min(40, round(seconds / warm[-1]))))
    plain = [_step(engine, data, WARM_UP + step) for step in range(steps)]
    if not plays:
        return TimedStep(plain, [], resident)
    first = WARM_UP + steps
    with OperatorTimer():
        _step(engine, data, first)
    timer = OperatorTimer()
    with timer:
        for step in range(first + 1, first + 1 + plays):
            _step(engine, data, step)
    return TimedStep(plain, timer.kernels(plays), resident)


def _step(engine: Engine, data: Any, step: int) -> float:
    """Take a step as the trainer does, and return its seconds."""
    began = time.perf_counter()
    train_step(engine, training_batches(data, engine, step), 1e-3)
    return time.perf_counter() - began


def time_products(
    rank: int, world: int, dtypes: list[str], sizes: list[list[int]], threads: int, seconds: float
) -> dict[str, list[float]]:
    """Time matrix products of all combinations of sizes.

    Args:
        rank: of this process.
        world: number of ranks; all measure at the same time.
        dtypes: e.g. float32.
        sizes: rows, inner widths and columns.
        threads: of this rank.
        seconds: for each product, about.

    Returns:
        By dtype, the seconds of each; the columns change fastest.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()
    return {
        dtype: [
            _time_product(getattr(torch, dtype), rows, inner, columns, seconds)
            for rows, inner, columns in product(*sizes)
        ]
        for dtype in dtypes
    }


def _time_product(dtype: torch.dtype, rows: int, inner: int, columns: int, seconds: float) -> float:
    size = (rows * inner + inner * columns + rows * columns) * dtype.itemsize
    operands = [
        (
            torch.zeros(rows, inner, dtype=dtype),
            torch.zeros(inner, columns, dtype=dtype),
            torch.zeros(rows, columns, dtype=dtype),
        )
        for _ in range(max(1, min(16, CACHE // size)))
    ]
    turns = _in_turn([partial(torch.mm, a, b, out=out) for a, b, out in operands])
    return _timed(lambda: next(turns)(), seconds)


def _in_turn(calls: list[Callable[[], Any]]) -> Iterator[Callable[[], Any]]:
    while True:
        yield from calls


def _timed(call: Callable[[], Any], seconds: float) -> float:
    """Return the median time of a call, of what fits in `seconds`, and of 3 at least."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
