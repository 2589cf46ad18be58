"""A real step on real ranks, with counters that share nothing with the planner's."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dmoe.config.schema import Config
from dmoe.distributed.all_to_all import comm_timers
from dmoe.distributed.init import init_distributed
from dmoe.train.engine import Engine, build_engine
from dmoe.train.step import compute_gradients, train_step, training_batches, update


def size(tensors: Any) -> int:
    """Sum the bytes of the tensors as this rank holds them."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)


class Sums(TorchDispatchMode):
    """Counts the bytes that sums and gathers of a rank send, by a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d.") and "alltoall" not in name:
            groups = [
                a for a in args if isinstance(a, torch.ScriptObject) and "Group" in str(a._type())
            ]
            ranks = dist.ProcessGroup.unbox(groups[0]).size()
            whole = max(size([t]) for t in tree_leaves(args) if isinstance(t, torch.Tensor))
            self.sent += (2 if "allreduce" in name else 1) * whole * (ranks - 1) // ranks
        return func(*args, **(kwargs or {}))


def measure(rank: int, world: int, config: Config, vocabulary: int) -> dict[str, int]:
    """Return bytes of one step of this rank: state, exchange, sums, and the peak of memory."""
    torch.set_num_threads(1)
    engine = build_engine(config, init_distributed("cpu"), vocabulary)
    data = engine.task.open_data()
    for step in range(2):
        train_step(engine, training_batches(data.train, engine, step), 1e-3)
    # gloo's threads release what they sent a little later: that can only add, at some times
    found = {"peak": min(peak_of_step(engine, data) for _ in range(6))}
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
