"""Latency and bandwidth between pairs of ranks, clocks and texts of all; times of collectives.

Pairs are met as in a tournament: in round s, rank r exchanges with the rank whose sum with r is s
(modulo W), so that every round is a set of disjoint pairs and W rounds meet all of them. A pair
exchanges through an all-to-all whose other splits are empty: with NCCL one communicator serves all
pairs, where send and recv would make one for each.

Letters: W ranks.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PINGS = 8
BLOCK = 1 << 20
"""Bytes of one exchange for the bandwidth."""


@dataclass(frozen=True)
class Link:
    """One measured pair; the times are those of the slower side."""

    first: int
    second: int
    latency: float
    """Seconds of one exchange of 8 bytes each way."""
    bandwidth: float
    """Bytes per second in each direction, both at once, with all pairs of the round busy."""


def measure_links(device: torch.device, seconds: float = 5.0) -> list[Link]:
    """Measure as many rounds of pairs as fit in `seconds`. Collective.

    With few ranks all pairs are met; with many, rounds are spread evenly. Whether there is time for
    another round is agreed by one reduction per round.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    found = torch.zeros(world, world, 2, dtype=torch.float64, device=device)
    end = time.monotonic() + seconds
    for shift in _spread(world):
        partner = (shift - rank) % world
        _exchange(rank, partner, 8, device)  # the first use of a pair opens its connection
        latency = _timed(rank, partner, 8, PINGS, device)
        rate = BLOCK / _timed(rank, partner, BLOCK, 1, device)
        if partner != rank:
            found[rank, partner] = torch.tensor([latency, rate], dtype=torch.float64)
        late = torch.tensor(int(time.monotonic() > end), device=device)
        dist.all_reduce(late, op=dist.ReduceOp.MAX)
        if late.item():
            break
    dist.all_reduce(found)
    values = found.cpu()
    return [
        Link(a, b, float(values[[a, b], [b, a], 0].max()), float(values[[a, b], [b, a], 1].min()))
        for a in range(world)
        for b in range(a + 1, world)
        if values[a, b, 1] > 0
    ]


def clock_offsets(device: torch.device) -> list[float]:
    """Return the clock of each rank minus that of rank 0, in seconds. Collective.

    Read after a barrier, so good to the time in which ranks leave one (milliseconds).
    """
    dist.barrier()
    times = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=device)
    times[dist.get_rank()] = time.time()
    dist.all_reduce(times)
    return (times - times[0]).tolist()


def gather_texts(text: str, device: torch.device) -> list[str]:
    """Return the text of every rank (UTF-8). Collective: two all-gathers, no pickle."""
    encoded, world = text.encode(), dist.get_world_size()
    size = torch.tensor(len(encoded), device=device)
    sizes = [torch.zeros_like(size) for _ in range(world)]
    dist.all_gather(sizes, size)
    longest = max(int(s) for s in sizes)
    own = torch.zeros(longest, dtype=torch.uint8, device=device)
    own[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8, device=device)
    every = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(every, own)
    pairs = zip(every, sizes, strict=True)
    return [bytes(part[: int(size)].tolist()).decode() for part, size in pairs]


def _spread(world: int) -> list[int]:
    """Order the rounds so that any first few are spread over all."""
    order = sorted(range(world), key=lambda s: int(f"{s:010b}"[::-1], 2))
    return order if world > 1 else []


def _timed(rank: int, partner: int, size: int, times: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        _exchange(rank, partner, size, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / times


def _exchange(rank: int, partner: int, size: int, device: torch.device) -> Tensor:
    """Exchange `size` bytes with `partner`; a rank that is its own partner sends nothing."""
    splits = [0] * dist.get_world_size()
    splits[partner] = size if partner != rank else 0
    rows = torch.zeros(sum(splits), dtype=torch.uint8, device=device)
    received = torch.empty_like(rows)
    dist.all_to_all_single(received, rows, splits, splits)
    return received


def time_collectives(
    rank: int, world: int, sizes: list[int], count: int
) -> dict[str, list[list[float]]]:
    """Time the collectives of a step among all ranks. Collective.

    Args:
        rank: of this process.
        world: number of ranks.
        sizes: bytes that a rank sends, about.
        count: calls of each size.

    Returns:
        By kind: [bytes sent, seconds].
    """
    found = defaultdict(list)
    for size in sizes:
        part = max(1, size // 4 // world)
        whole, piece = torch.zeros(world, part), torch.zeros(part)
        out = torch.zeros(world, part)
        calls: dict[str, tuple[int, Callable[[], Any]]] = {
            "all_to_all": (1, partial(dist.all_to_all_single, out, whole)),
            "all_reduce": (2, partial(dist.all_reduce, whole)),
            "all_gather": (1, partial(dist.all_gather, list(out), piece)),
            "reduce_scatter": (1, partial(dist.reduce_scatter, piece, list(whole))),
        }
        for kind, (times, call) in calls.items():
            dist.barrier()
            sent = times * 4 * part * (world - 1)
            found[kind].append([float(sent), _slowest(_median(call, count))])
    return dict(found)


def _slowest(seconds: float) -> float:
    """Return the largest time of all ranks. Collective."""
    largest: Tensor = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def _median(call: Callable[[], Any], count: int) -> float:
    """Return the median time of `count` calls, after one that does not count."""
    call()
    times = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def count_of_rank_0(count: int) -> int:
    """Return rank 0's count. Collective where there are ranks."""
    shared = torch.tensor(count)
    if dist.is_initialized():
        dist.broadcast(shared, 0)
    return int(shared)
