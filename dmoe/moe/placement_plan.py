"""Plans where experts move, so that the ranks of an EP group have even expected loads.

Every rank holds the same number of experts, e. With w[x] the rows expected of expert x, and work[r]
the sum over the experts of rank r, a plan makes max(work) / mean(work) small, and moves few:

1. swaps: while it helps, the rank with most work swaps an expert with the one with least, the pair
   that brings the two closest; first among ranks of one host, where moves are cheap, then all;
2. longest processing time (Graham 1969): in descending order of w, each expert goes to the rank
   with least work among those with a free place; then swaps. Groups get the ranks that hold most of
   their experts already, else a rank of the host that does.

Taken is the first of 1 (one host), 1 (all) and 2 whose largest work is within `SLACK` of the best.
Nothing moves where that lowers the largest work by less than `MIN_GAIN` of the mean. A function of
its arguments alone: ranks that know the same loads make the same plan, without communication.

Cost: under 1 ms for E = 256 on 64 ranks, in plain Python (benchmarks/placement.py).

Letters: E experts, e experts per rank.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Sequence

from dmoe.moe.placement import ExpertPlacement

MIN_GAIN = 0.05
"""Least gain of a move: of the largest work, as a share of the mean."""
SLACK = 0.01
"""How much worse than the best plan one with fewer or shorter moves may be, in the same unit."""

Owned = list[list[tuple[float, int]]]
"""(rows, expert) of each rank, in ascending order."""


def plan_placement(
    rows_E: Sequence[float], placement: ExpertPlacement, host_of_rank: Sequence[int] = ()
) -> ExpertPlacement:
    """Return the placement to move to; `placement` itself if a move does not pay.

    Args:
        rows_E: rows expected of each expert.
        placement: where the experts are; e on each rank.
        host_of_rank: the host of each rank of the group; empty: they share one.
    """
    ranks, mean = len(placement.experts), sum(rows_E) / len(placement.experts)
    hosts = list(host_of_rank) or [0] * ranks
    members = [[rank for rank in range(ranks) if hosts[rank] == host] for host in {*hosts}]
    now = [sorted((rows_E[expert], expert) for expert in own) for own in placement.experts]
    largest_now = _largest(now)
    if largest_now - mean < MIN_GAIN * mean or mean <= 0:
        return placement
    smallest_first = sorted(rows_E[expert] for own in placement.experts for expert in own)
    # No plan has less: some rank has the largest expert, and at best the smallest ones beside it.
    bound = max(mean, smallest_first[-1] + sum(smallest_first[: len(now[0]) - 1]))
    enough, plans, plan = bound + SLACK * mean, list[tuple[float, Owned]](), now
    stages = [members, [range(ranks)]] if len(members) > 1 else [[range(ranks)]]
    for among in (*stages, None):
        plan = _longest_first(now, hosts, enough) if among is None else _swaps(plan, among, enough)
        plans.append((_largest(plan), plan))
        if plans[-1][0] <= enough:
            break
    best = min(largest for largest, _ in plans)
    largest, plan = next(found for found in plans if found[0] <= best + SLACK * mean)
    if largest_now - largest < MIN_GAIN * mean:
        return placement
    return keep_places(placement, [[expert for _, expert in own] for own in plan])


def keep_places(placement: ExpertPlacement, owned: Iterable[Iterable[int]]) -> ExpertPlacement:
    """Place the experts `owned` by each rank: those that stay keep their physical ids."""
    new = []
    for before, after in zip(placement.experts, map(set, owned), strict=True):
        arriving = iter(sorted(after - {*before}))
        new.append(tuple(e if e in after else next(arriving) for e in before))
    return ExpertPlacement(tuple(new))


def max_over_mean(rows_E: Sequence[float], placement: ExpertPlacement) -> float:
    """Return the rows of the busiest rank over the mean of the ranks; 1 without rows."""
    work = [sum(rows_E[expert] for expert in own) for own in placement.experts]
    return max(work) * len(work) / sum(work) if sum(work) else 1.0


def _largest(owned: Owned) -> float:
    return max(sum(rows for rows, _ in own) for own in owned)


def _swaps(before: Owned, groups: Sequence[Sequence[int]], enough: float) -> Owned:
    """Return `before` after swaps among the ranks of each group."""
    plan = [own.copy() for own in before]
    for ranks in groups:
        _swap(plan, ranks, enough)
    return plan


def _swap(owned: Owned, ranks: Sequence[int], enough: float) -> None:
    """Swap experts between the busiest of `ranks` and the idlest that helps, until it is enough."""
    groups = [owned[rank] for rank in ranks]
    work = [sum(rows for rows, _ in own) for own in groups]
    for _ in range(2 * len(work) + len(groups[0])):
        most, least = max(work), min(work)
        if most <= enough:
            return
        hot, cold = work.index(most), work.index(least)
        pair = _best_pair(groups[hot], groups[cold], most - least)
        if pair is None:  # of the idlest only: one or two others may have a better expert
            for cold in sorted(range(len(work)), key=work.__getitem__)[1:3]:
                pair = _best_pair(groups[hot], groups[cold], most - work[cold])
                if pair is not None:
                    break
            else:
                return
        leaving, coming = pair
        for index, old, new in ((hot, leaving, coming), (cold, coming, leaving)):
            groups[index].remove(old)
            insort(groups[index], new)
            work[index] += new[0] - old[0]


def _best_pair(
    hot: list[tuple[float, int]], cold: list[tuple[float, int]], gap: float
) -> tuple[tuple[float, int], tuple[float, int]] | None:
    """Return the experts whose swap brings two ranks closest; None if none brings them closer."""
    best, least = None, gap / 2 * (1 - 1e-9)
    for expert in hot:
        wanted = expert[0] - gap / 2
        index = bisect_left(cold, (wanted, -1))
        for other in cold[max(0, index - 1) : index + 1]:
            miss = abs(other[0] - wanted)
            if miss < least:
                best, least = (expert, other), miss
    return best


def _longest_first(now: Owned, hosts: list[int], enough: float) -> Owned:
    groups: Owned = [[] for _ in now]
    places, free = len(now[0]), [(0.0, group) for group in range(len(now))]
    for rows, expert in sorted((own for rank in now for own in rank), reverse=True):
        work, group = heapq.heappop(free)
        groups[group].append((rows, expert))
        if len(groups[group]) < places:
            heapq.heappush(free, (work + rows, group))
    for own in groups:
        own.reverse()
    _swap(groups, range(len(groups)), enough)
    return _nearest_ranks(groups, now, hosts)


def _nearest_ranks(groups: Owned, now: Owned, hosts: list[int]) -> Owned:
    """Give each group the rank that holds most of its experts, else the host that does."""
    rank_of = {expert: rank for rank, own in enumerate(now) for _, expert in own}
    at_rank = Counter((g, rank_of[x]) for g, group in enumerate(groups) for _, x in group)
    plan: dict[int, int] = {}
    placed: set[int] = set()
    for (group, rank), _ in at_rank.most_common():
        if group not in placed and rank not in plan:
            plan[rank] = group
            placed.add(group)
    for group in (g for g in range(len(groups)) if g not in placed):
        at_host = Counter(hosts[rank_of[expert]] for _, expert in groups[group])
        free = (rank for rank in range(len(now)) if rank not in plan)
        plan[max(free, key=lambda rank: at_host[hosts[rank]])] = group
    return [groups[plan[rank]] for rank in range(len(now))]
