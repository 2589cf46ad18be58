"""Placement of experts on expert-parallel ranks, and the map from logical to physical expert ids.

Uniform experts are placed in equal, contiguous runs. Experts of different cost are spread so that
the ranks have equal expected work, by longest processing time first (Graham 1969; at most 4/3 of
the best makespan):

    in descending order of cost, ties to the lower id, each expert goes to the rank with the least
    work so far; among several, to the one with fewer experts, then to the lower rank

Expected work is the cost, as if all experts were selected equally often. Ranks may then hold
different numbers of experts. So that the exchange still sees equal runs, every rank has S physical
experts, S the most experts of any rank. Unused ones get no rows; in the padded exchange, slots that
are always empty:

    costs 6 5 4 3 2 on two ranks     rank 0: experts 0 3 4  (11)      rank 1: experts 1 2  (9)
    physical experts, S = 3          0 3 4 | 1 2 -                    physical id of each: 0 3 4 1 2

Within a rank, experts of one shape are adjacent (in the order of their first expert), so that their
rows are one block. Everything here is a function of shapes and EP alone: every rank computes the
same, without communication.

Letters: E experts, T tokens, K experts per token, S physical experts of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from dmoe.moe.constants import HostConstant
from dmoe.moe.routing import DispatchPlan


@dataclass(frozen=True)
class ExpertPlacement:
    """The experts of each expert-parallel rank."""

    experts: tuple[tuple[int, ...], ...]
    """Global expert ids of each rank, in the order of their physical ids."""

    @property
    def experts_per_rank(self) -> int:
        """S, unused physical experts included."""
        return max(len(owned) for owned in self.experts)

    @cached_property
    def rank_of(self) -> dict[int, int]:
        """The expert-parallel rank of each global expert id."""
        return {expert: rank for rank, owned in enumerate(self.experts) for expert in owned}

    @cached_property
    def physical_ids(self) -> HostConstant:
        """The physical id of each expert, [E]: `rank * S + index on the rank`."""
        physical = {
            expert: rank * self.experts_per_rank + index
            for rank, owned in enumerate(self.experts)
            for index, expert in enumerate(owned)
        }
        return HostConstant([physical[expert] for expert in sorted(physical)])

    def sum_per_rank(self, count_E: Tensor) -> Tensor:
        """Sum a value per expert over the experts of each rank, [EP].

        Values of zero-cost experts, at the end of `count_E`, belong to no rank.
        """
        physical_E = self.physical_ids.on(count_E.device)
        by_physical_id = count_E.new_zeros(self.experts_per_rank * len(self.experts)).scatter(
            0, physical_E, count_E[: len(physical_E)]
        )
        return by_physical_id.view(len(self.experts), self.experts_per_rank).sum(1)

    def pools_per_rank(self, pool: int) -> int:
        """Return the largest number of pools of `pool` experts that one rank holds a part of."""
        return max(len({expert // pool for expert in owned}) for owned in self.experts)

    @cached_property
    def is_identity(self) -> bool:
        """True if physical ids are the logical ids and no physical expert is unused."""
        return self.physical_ids.values == tuple(range(self.experts_per_rank * len(self.experts)))


def contiguous_placement(num_experts: int, ranks: int) -> ExpertPlacement:
    """Place equal, contiguous runs: rank r holds the r-th."""
    share = num_experts // ranks
    assert share * ranks == num_experts, f"{num_experts} experts do not divide by {ranks} ranks"
    return ExpertPlacement(
        tuple(tuple(range(rank * share, (rank + 1) * share)) for rank in range(ranks))
    )


def balanced_placement(
    costs: Sequence[int], shapes: Sequence[object], ranks: int
) -> ExpertPlacement:
    """Place experts by longest processing time first; every rank holds one if there are enough.

    `shapes` are equal where experts can share a grouped GEMM.
    """
    assert len(costs) >= ranks, f"{len(costs)} experts for {ranks} ranks"
    owned: list[list[int]] = [[] for _ in range(ranks)]
    for expert in sorted(range(len(costs)), key=lambda e: (-costs[e], e)):
        min(owned, key=lambda own: (sum(costs[e] for e in own), len(own))).append(expert)
    first = {shape: expert for expert, shape in reversed(list(enumerate(shapes)))}
    return ExpertPlacement(
        tuple(tuple(sorted(own, key=lambda e: (first[shapes[e]], e))) for own in owned)
    )


def to_physical_experts(plan: DispatchPlan, placement: ExpertPlacement) -> DispatchPlan:
    """Map `plan` to physical expert ids and leave out zero-cost experts, which are not dispatched.

    Pooled slots get their rows per rank, because a pool may span ranks: every rank that holds a
    part of it gets rows for all of its slots. Returns `plan` itself if nothing applies; else a few
    operations on [T, K]. No host sync.
    """
    if plan.slots is not None and plan.slots.pool > 1:
        rows = plan.slots.rows_per_expert * placement.pools_per_rank(plan.slots.pool)
        plan = replace(plan, slots=replace(plan.slots, rows_per_rank=rows))
    if plan.num_zero_cost:
        num_experts = plan.num_experts - plan.num_zero_cost
        keep_TK = ~plan.is_zero_cost_TK
        plan = replace(
            plan,
            expert_TK=plan.expert_TK.clamp(max=num_experts - 1),
            keep_TK=keep_TK if plan.keep_TK is None else plan.keep_TK & keep_TK,
            num_experts=num_experts,
            num_zero_cost=0,
        )
    if placement.is_identity:
        return plan
    physical_E = placement.physical_ids.on(plan.expert_TK.device)
    return replace(
        plan,
        expert_TK=physical_E[plan.expert_TK],
        num_experts=placement.experts_per_rank * len(placement.experts),
    )
