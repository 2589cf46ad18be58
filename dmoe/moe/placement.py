"""Which rank of an EP group holds which experts, and the table that sends a choice to its place.

Uniform experts lie in equal runs of neighbours, as the exchange expects them. Experts of different cost are spread so that the ranks
have equal expected work, by longest processing time first (Graham 1969; at most 4/3 of the best makespan):

    in descending order of cost, ties to the lower id, each expert goes to the rank that has the least work so far; of several, to
    the one with fewer experts, then to the lower rank

Expected work is the cost, as if all experts were chosen equally often. The numbers of experts a rank has may differ. So that the
exchange still sees equal runs, every rank has S *places*, S the most experts of a rank. Those left over get no
rows; in the padded exchange, slots that are always empty and travel as zeros:

    costs 6 5 4 3 2 on two ranks       rank 0: experts 0 3 4  (11)      rank 1: experts 1 2  (9)
    places, S = 3                      0 3 4 | 1 2 -                     place of each expert: 0 3 4 1 2

Within a rank, experts of one shape stand together (in the order of their first expert), so that their rows are one block.
Everything here is a function of shapes and EP alone: every rank computes the same, and nothing is sent.

Letters: E experts, T tokens, K experts a token, S places of one rank.

A few integers that the host knows, as a tensor where it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dmoe.moe.routing import Routing


@dataclass(frozen=True)
class ExpertPlacement:
    experts: tuple[tuple[int, ...], ...]
    """Of each EP rank the global ids of its experts, in the order of their places."""

    @property
    def experts_per_rank(self) -> int:
        """S."""
        return max(len(owned) for owned in self.experts)

    @cached_property
    def rank_of(self) -> dict[int, int]:
        """The EP rank of each global expert id."""
        return {expert: rank for rank, owned in enumerate(self.experts) for expert in owned}

    @cached_property
    def physical_ids(self) -> HostConstant:
        """[E]: `rank * S + slot` of each global expert id."""
        place = {
            e: rank * self.experts_per_rank + slot
            for rank, owned in enumerate(self.experts)
            for slot, e in enumerate(owned)
        }
        return HostConstant([place[expert] for expert in sorted(place)])

    def sum_per_rank(self, count_E: Tensor) -> Tensor:
        """[EP]: a number of each expert, summed over the experts of each rank; those of zero cost, at the end, are nobody's."""
        places_E = self.physical_ids.on(count_E.device)
        by_place = count_E.new_zeros(self.experts_per_rank * len(self.experts)).scatter(
            0, places_E, count_E[: len(places_E)]
        )
        return by_place.view(len(self.experts), self.experts_per_rank).sum(1)

    @cached_property
    def is_identity(self) -> bool:
        """Whether every expert's place is its id, and no place is empty."""
        return self.physical_ids.values == tuple(range(self.experts_per_rank * len(self.experts)))


def contiguous_placement(num_experts: int, ranks: int) -> ExpertPlacement:
    """Rank r has the r-th of equal runs."""
    share = num_experts // ranks
    assert share * ranks == num_experts, (
        f"{num_experts} experts cannot be shared by {ranks} ranks in equal runs"
    )
    return ExpertPlacement(
        tuple(tuple(range(rank * share, (rank + 1) * share)) for rank in range(ranks))
    )


def balanced_placement(
    costs: Sequence[int], shapes: Sequence[object], ranks: int
) -> ExpertPlacement:
    """The rule above; `shapes` are equal where experts can share a grouped GEMM. Every rank has an expert if there are enough."""
    assert len(costs) >= ranks, f"{len(costs)} experts for {ranks} ranks"
    owned: list[list[int]] = [[] for _ in range(ranks)]
    for expert in sorted(range(len(costs)), key=lambda e: (-costs[e], e)):
        min(owned, key=lambda mine: (sum(costs[e] for e in mine), len(mine))).append(expert)
    first = {shape: expert for expert, shape in reversed(list(enumerate(shapes)))}
    return ExpertPlacement(
        tuple(tuple(sorted(mine, key=lambda e: (first[shapes[e]], e))) for mine in owned)
    )


def to_physical_experts(routing: Routing, placement: ExpertPlacement) -> Routing:
    """`routing` as a dispatcher wants it: places for ids, and nothing of what stays at home.

    `routing` itself where neither is asked for; else a few operations on [T, K]. No host sync.
    """
    if routing.num_zero_cost:
        at_home_TK = routing.is_zero_cost_TK
        made_TK = ~at_home_TK if routing.keep_TK is None else routing.keep_TK & ~at_home_TK
        routed = routing.score_TE.shape[1] - routing.num_zero_cost
        routing = replace(
            routing,
            expert_TK=routing.expert_TK.clamp(max=routed - 1),
            keep_TK=made_TK,
            physical_experts=routed,
        )
    if placement.is_identity:
        return routing
    places_E = placement.physical_ids.on(routing.expert_TK.device)
    return replace(
        routing,
        expert_TK=places_E[routing.expert_TK],
        physical_experts=placement.experts_per_rank * len(placement.experts),
    )


class HostConstant:
    """Copied to a device once and kept there: a copy in every forward would make the host wait.

    No buffer of a module, because it is no state: it is in no checkpoint, and `to_empty` does not wipe it.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self.values = tuple(numbers)
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """int64 [n]."""
        if device not in self._copies:
            self._copies[device] = torch.tensor(self.values, dtype=torch.int64, device=device)
        return self._copies[device]
