"""Copies for the step: which experts are copied to which rank, and the division of their rows.

    load_r   = rows of the experts that rank r holds           (of one layer and micro-batch)
    level    = ceil(sum_r load_r / P), the evenest that integer rows allow
    repeat     from the rank with the most rows above the level, to the rank with the most below it
               that has a free slot: the expert with the most rows left on its own rank gives
               min(its rows, rows above, rows below) of them to a copy
    until      no rank is above the level, no slot is free, or no move is worth its transfer

Each move ends the excess of a rank, fills a rank, or moves an expert whole: Walker's alias method
(1977) with several items per bin. Where slots run out the level is raised by bisection, so that
none is spent on a rank that is not the fullest. Then every copied expert's rows are divided: a rank
that holds it computes its own rows first, and the others' follow in order of their rank.

Integers only, of counts that all ranks have: every rank computes the same plan, without
communication. Host time: `python benchmarks/placement.py`. Like ECHO of Megatron-Core and LLEP
(2026), but with the count of rows alone.

Letters: E experts, P ranks of one EP group, e experts per rank, I instances: the e experts of rank
0, its copies, the e experts of rank 1 ...
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
AUTO_SLOTS = (1, 2)
"""Slots per rank that `copies: auto` compares with none."""
BISECTIONS = 4
TOLERANCE = 0.01
"""A level this much above the mean is not bisected further."""


@dataclass(frozen=True)
class CopyRule:
    """When experts are copied."""

    slots: int | None
    """Spare slots per rank; None: as many of `AUTO_SLOTS` as pay."""
    break_even: int = 1
    """Rows that one copy has to take over, in a layer's forward and backward, to pay for the
    transfer of its weights and gradients (auto)."""

    @classmethod
    def of(cls, copies: int | str, break_even: int | None = None) -> CopyRule | None:
        """Return the rule of `parallel.placement.copies` and `break_even`; None for 0."""
        return cls(None if isinstance(copies, str) else copies, break_even or 1) if copies else None


@dataclass(frozen=True)
class Move:
    """`rows` rows of `expert` are computed by its copy on `rank`."""

    expert: int
    rank: int
    rows: int


@dataclass(frozen=True)
class CopyPlan:
    """The copies of one layer and micro-batch, and who computes which rows."""

    count_PE: Counts
    """Rows that each rank of the group sends to each expert."""
    moves: tuple[Move, ...]
    """At most one for each (expert, rank)."""

    @property
    def ranks(self) -> int:
        """P."""
        return len(self.count_PE)

    @property
    def per_rank(self) -> int:
        """E / P."""
        return int(self.count_PE.shape[1]) // self.ranks

    @cached_property
    def copies(self) -> tuple[tuple[int, ...], ...]:
        """The experts copied to each rank, in the order of its slots."""
        found: list[list[int]] = [[] for _ in range(self.ranks)]
        for move in self.moves:
            found[move.rank].append(move.expert)
        return tuple(tuple(sorted(experts)) for experts in found)

    @cached_property
    def expert_I(self) -> Counts:
        """The expert of each instance."""
        own = range(self.ranks)
        return np.array(
            [
                expert
                for rank in own
                for expert in (
                    *range(rank * self.per_rank, (rank + 1) * self.per_rank),
                    *self.copies[rank],
                )
            ]
        )

    @cached_property
    def edge_P(self) -> Counts:
        """The first instance of each rank, and at the end their number, [P + 1]."""
        return np.cumsum([0, *(self.per_rank + len(experts) for experts in self.copies)])

    @cached_property
    def rows_PI(self) -> Counts:
        """Rows that each rank sends to each instance."""
        rows_PI = self.count_PE[:, self.expert_I]
        if self.moves:
            self._divide(rows_PI)
        return rows_PI

    @property
    def rows_of_ranks(self) -> Counts:
        """Rows that each rank computes, [P]."""
        return np.add.reduceat(self.rows_PI.sum(0), self.edge_P[:-1])

    def _divide(self, rows_PI: Counts) -> None:
        """Divide the columns of all experts that have copies, in place."""
        taken_EP = np.zeros(self.count_PE.shape[::-1], np.int64)
        for move in self.moves:
            taken_EP[move.expert, move.rank] = move.rows
        lost = taken_EP.sum(1)
        rank_I = np.repeat(np.arange(self.ranks), np.diff(self.edge_P))
        where = np.flatnonzero(lost[self.expert_I])
        # by expert, then by rank: instances of one expert are neighbours
        where = where[np.argsort(self.expert_I[where], kind="stable")]
        expert, rank = self.expert_I[where], rank_I[where]
        home = rank == expert // self.per_rank
        share = taken_EP[expert, rank]
        share[home] = (self.count_PE.sum(0) - lost)[expert[home]]
        count = self.count_PE[:, expert]
        # a rank's own rows first
        own = np.minimum(count[rank, np.arange(len(rank))], share)
        first = np.flatnonzero(np.diff(expert, prepend=-1))
        group = np.cumsum(np.diff(expert, prepend=-1) != 0) - 1
        left = self.count_PE[:, expert[first]].copy()
        left[rank, group] -= own
        # then the rest of the sources, in order, to the rest of the shares, in order
        high = np.cumsum(left, 0)[:, group]
        low = high - left[:, group]
        rest = share - own
        end = np.cumsum(rest)
        start = end - rest
        before = start[first][group]
        divided = np.minimum(high, end - before) - np.maximum(low, start - before)
        divided = np.maximum(divided, 0)
        divided[rank, np.arange(len(rank))] += own
        rows_PI[:, where] = divided


def plan_copies(count_PE: Counts, rule: CopyRule) -> CopyPlan:
    """Plan the copies of one layer and micro-batch.

    Args:
        count_PE: int64, rows from each rank to each expert; rank r holds experts r*E/P and on.
        rule: slots, or the break-even of `auto`.
    """
    ranks = len(count_PE)
    load_E = count_PE.sum(0)
    by_rank = load_E.reshape(ranks, -1)
    load_P, total = by_rank.sum(1).tolist(), int(load_E.sum())
    level, loads = -(-total // ranks), by_rank.tolist()
    if max(load_P) <= level or rule.slots == 0:
        return CopyPlan(count_PE, ())
    if rule.slots is not None:
        return CopyPlan(count_PE, _best_moves(loads, load_P, level, rule.slots, 1))
    plans = [_best_moves(loads, load_P, level, slots, rule.break_even) for slots in AUTO_SLOTS]
    cost = [_cost(load_P, moves, len(load_E) // ranks, rule.break_even) for moves in ((), *plans)]
    return CopyPlan(count_PE, ((), *plans)[cost.index(min(cost))])


def _cost(load_P: list[int], moves: tuple[Move, ...], per_rank: int, break_even: int) -> int:
    """Return the rows of the fullest rank, plus the transfers of the busiest, as rows."""
    load, transfers = list(load_P), [0] * len(load_P)
    for move in moves:
        home = move.expert // per_rank
        load[home] -= move.rows
        load[move.rank] += move.rows
        transfers[home] += 1
        transfers[move.rank] += 1
    return max(load) + break_even * max(transfers)


def _best_moves(
    loads: list[list[int]], load_P: list[int], level: int, slots: int, least: int
) -> tuple[Move, ...]:
    """Return the moves of the lowest level that `slots` reach, to 1% of the mean."""
    best, high = _moves(loads, load_P, level, slots, least, chained=False)
    low = level
    for step in range(BISECTIONS + 1):
        if high <= low + level * TOLERANCE:
            break
        middle = (low + high) // 2 if step else level
        moves, top = _moves(loads, load_P, middle, slots, least, chained=True)
        if top < high:
            best, high = moves, top
        if top > middle:
            low = middle
    return best


def _moves(
    loads: list[list[int]], load_P: list[int], level: int, slots: int, least: int, chained: bool
) -> tuple[tuple[Move, ...], int]:
    """Move rows from ranks above `level` to ranks below; return the moves and the most rows left.

    A move of fewer than `least` rows is not made. `chained`: a rank gives more than it has above
    the level if the taker's slots would not be filled otherwise, and takes from others in turn.
    """
    per_rank = len(loads[0])
    above = [(level - load, rank) for rank, load in enumerate(load_P) if load > level]
    below = [(load - level, rank) for rank, load in enumerate(load_P) if load < level]
    queues = {
        rank: [(-rows, rank * per_rank + i) for i, rows in enumerate(loads[rank])]
        for _, rank in above
    }
    for queue in (above, below, *queues.values()):
        heapify(queue)
    used, moves, stuck = [0] * len(load_P), list[Move](), 0
    while above and below:
        (excess, giver), (space, taker) = above[0], below[0]
        rows, expert = queues[giver][0]
        wanted = min(excess, space // (slots - used[taker])) if chained else excess
        amount = -max(rows, wanted, space)
        if amount < least:
            stuck = max(stuck, -excess)
            if max(wanted, space) > -least:
                break  # the most that any rank gives or takes is too little
            heappop(above)  # its largest expert is: the rank keeps what it has
            continue
        moves.append(Move(expert, taker, amount))
        used[taker] += 1
        heapreplace(queues[giver], (rows + amount, expert))
        _advance(above, min(0, excess + amount), giver)
        _advance(below, space + amount if used[taker] < slots else 0, taker)
        if excess + amount > 0 and used[giver] < slots:
            heappush(below, (-excess - amount, giver))
    left = max(stuck, -above[0][0] if above else 0)
    return tuple(moves), level + left


def _advance(queue: list[tuple[int, int]], key: int, rank: int) -> None:
    """Give the first rank of a queue its new key; without any it leaves."""
    if key:
        heapreplace(queue, (key, rank))
    else:
        heappop(queue)


@dataclass
class CopyTotals:
    """Copies of one layer in a step, summed over its forwards, recomputed ones included."""

    copies: int = 0
    """Experts that were copied to this rank."""
    sent_bytes: int = 0
    """Weights sent to copies and gradients of copies sent back, by this rank."""
    rows_fixed: int = 0
    """Rows of the rank with the most if nothing were copied; of this EP group, like the next."""
    rows: int = 0
    """Rows of the rank with the most."""
    rows_even: float = 0.0
    """Rows of a rank if all had equally many."""

    def add(self, plan: CopyPlan, rank: int) -> None:
        """Add the plan of a forward."""
        load_P = plan.rows_of_ranks
        self.copies += len(plan.copies[rank])
        self.rows_fixed += int(plan.count_PE.sum(0).reshape(plan.ranks, -1).sum(1).max())
        self.rows += int(load_P.max())
        self.rows_even += float(load_P.mean())
