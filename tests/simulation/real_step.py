"""A real step on real ranks, with counters that share nothing with the planner's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dmoe.config.schema import Config
from dmoe.distributed.exchange.comm_timer import comm_timers
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
            if name.startswith("c10d.allgather_."):  # a list of parts, none of which is the whole
                whole *= ranks
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
    steps = [peak_of_step(engine, data) for _ in range(6)]
    found = {"peak": min(tensors for tensors, _ in steps)}
    found["allocated"] = min(everything for _, everything in steps)
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


PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def peak_of_step(engine: Engine, data: Any) -> tuple[int, int]:
    """Return the most bytes of tensors, and of all that is allocated, live in a step.

    Counted by torch's CPU allocator from the begin of the profile; what was there before is added.
    No tensor: what a matrix product takes and returns within one call, its work buffers.
    """
    batches = training_batches(data.train, engine, 2)
    with torch.profiler.profile(profile_memory=True) as profile:
        train_step(engine, batches, 1e-3)
    return peaks(profile)


def peaks(profile: Any) -> tuple[int, int]:
    """Return the peaks of a profile: without the work buffers of matrix products, and with them."""
    moves = sorted(_moves(profile.profiler.kineto_results.experimental_event_tree(), None))
    taken, inside = dict[int, tuple[int, Any]](), set[int]()
    for index, (_, address, size, call) in enumerate(moves):
        if size > 0:
            taken[address] = (index, call)
        elif address in taken:
            begin, caller = taken.pop(address)
            if caller == call and call is not None:
                inside |= {begin, index}
    live, most = [0, 0], [0, 0]
    for index, (_, _, size, _) in enumerate(moves):
        for which in (0, 1):
            live[which] += 0 if which == 0 and index in inside else size
            most[which] = max(most[which], live[which])
    return most[0], most[1]


def _moves(events: Any, call: int | None) -> Iterator[tuple[int, int, int, int | None]]:
    """Yield time, address, bytes, and the matrix product in which they are moved, if one."""
    for event in events:
        if event.name == "[memory]":
            fields = event.extra_fields
            yield event.start_time_ns, fields.ptr, fields.alloc_size, call
        yield from _moves(event.children, event.id if event.name in PRODUCTS else None)
