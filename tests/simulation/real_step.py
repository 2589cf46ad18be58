"""A real step on real ranks, with counters that share nothing with the planner's."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dmoe.config.schema import Config
from dmoe.distributed.all_to_all import comm_timers
from dmoe.distributed.init import init_distributed
from dmoe.train.engine import Engine, build_engine
from dmoe.train.step import compute_gradients, train_step, training_batches, update


def size(tensors: Any) -> int:
    """Sum the bytes of the tensors as this rank holds them."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)


class Sums:
    """Counts the bytes that sums and gathers send, by patching torch.distributed's functions."""

    def __init__(self) -> None:
        self.sent = 0
        self.real = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}
        bases = ("_all_gather_base", "all_gather_into_tensor", "reduce_scatter_tensor")
        self.real |= {name: getattr(dist, name) for name in bases}

    def __enter__(self) -> Sums:
        for name, function in self.real.items():
            setattr(dist, name, self._counting(name, function))
        return self

    def __exit__(self, *error: object) -> None:
        for name, function in self.real.items():
            setattr(dist, name, function)

    def _counting(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group") or dist.group.WORLD
            ranks = group.size()
            tensors = [*args, *kwargs.values()]
            largest = max(size([t]) for t in tensors if isinstance(t, torch.Tensor))
            self.sent += (2 if name == "all_reduce" else 1) * largest * (ranks - 1) // ranks
            return function(*args, **kwargs)

        return call


def measure(rank: int, world: int, config: Config, vocabulary: int) -> dict[str, int]:
    """Return bytes of one step of this rank: state, exchange, sums, and the peak of memory."""
    torch.set_num_threads(1)
    engine = build_engine(config, init_distributed("cpu"), vocabulary)
    data = engine.task.open_data()
    for step in range(2):
        train_step(engine, training_batches(data.train, engine, step), 1e-3)
    found = {"peak": peak_of_step(engine, data)}
    timers = comm_timers(engine.model)
    for timer in timers:
        timer.start(lambda: 0.0)
    with Sums() as sums:
        totals = compute_gradients(engine, training_batches(data.train, engine, 3))
        grads = [p.grad for p in engine.model.parameters() if p.grad is not None]
        found["gradients"] = size(grads)
        update(engine, totals, 1e-3)
    found["sums"] = sums.sent
    found["exchange"] = sum(timer.sent_bytes for timer in timers)
    found["weights"] = size(engine.model.parameters())
    states = (v for state in engine.optimizer.state.values() for v in state.values())
    found["moments"] = size(v for v in states if isinstance(v, torch.Tensor) and v.dim())
    return found


def peak_of_step(engine: Engine, data: Any) -> int:
    """Return the most bytes live in a step, counted by torch's CPU allocator.

    It counts from the begin of the profile; what was there before is added.
    """
    batches = training_batches(data.train, engine, 2)
    with torch.profiler.profile(profile_memory=True) as profile:
        train_step(engine, batches, 1e-3)
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    moves = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, number in moves:
        live += number
        peak = max(peak, live)
    return peak
