"""Which of the router's choices find a slot.

An expert takes at most C assignments from each group of tokens; who comes later is dropped and its token keeps only its other
choices (or nothing: then the residual stream alone carries it). GShard (Lepikhin et al. 2020), Switch (Fedus et al. 2021).
The order of a queue is in `queues.py`, the second chance of who is late in `overflow.py`.

Letters: T tokens, E experts, K experts a token, G groups, C slots of one (group, expert), W ranks.

A second chance for assignments that found no slot: the token's next eligible expert.

The j-th overflowing assignment of a token (in order of preference) is offered once to the j-th expert after those the router chose,
`routing.next_expert_TS[t, j]`. It queues behind everybody who was served in the first round: by position in the order of the assignments
that overflowed (choice-major, then tokens), by score in the order of the *spare's* score. Who fits takes the slot and its expert
and weight replace the old ones; who does not is dropped as before. This is one round of "No-Token-Left-Behind" (Fedus et al. 2021,
Switch Transformers, appendix B, who saw no gain in quality from it: it is for models that must not drop).

Cost: one or two more stable sorts; with a capacity shared by all ranks one more all-gather, as large as the first round's. No host
sync.

Letters: T tokens, E experts, K experts a token, S spare experts a token, G groups, C slots of one (group, expert).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from dmoe.config.schema import CapacityConfig
from dmoe.moe.comm import DataParallelComm
from dmoe.moe.expert_queue import (
    Assignments,
    QueuePositions,
    count_per_expert,
    group_of_token,
    priority_score,
    queue_positions,
)
from dmoe.moe.routing import Routing, TokenContext


def expert_capacity(
    factor: float, tokens: int, top_k: int, num_experts: int, min_capacity: int
) -> int:
    """`C_g = max(min_capacity, ceil(factor * K * T_g / E))`, at most T_g: a token chooses an expert once at the most.

    T_g counts positions, padding included, so that C is known from shapes alone and the padded exchange needs no host read.
    """
    wanted = math.ceil(
        factor * top_k * tokens / num_experts - 1e-9
    )  # 1.1 * 10 is 11.000000000000002 and must not give 12
    return min(tokens, max(min_capacity, wanted))


def apply_capacity(
    routing: Routing, config: CapacityConfig, context: TokenContext, comm: DataParallelComm
) -> Routing:
    """`routing` with `keep_TK` and `slot_TK` set: the first C assignments in each (group, expert) queue survive.

    Groups `rank` and `sequence` are equal contiguous runs of this rank's tokens: no collective. Group `global` is the tokens of all
    ranks in rank order, equally many on each, and `context.capacity` is their common C: one all-gather, and one more for
    `next_choice` (`queues.find_places` tells its size). The result says what the dispatchers need of it: G = 1 group and
    min(C, T) slots, for more than that no expert can get from this rank. Dropless (`context.capacity` None) returns `routing`
    itself. Experts that cost nothing (`routing.free`) have no queue: who chose one keeps it. No host sync.
    """
    if context.capacity is None:
        return routing
    tokens, num_experts = routing.score_TE.shape
    groups = max(1, context.groups)  # a batch of no sequences has none
    shared = config.group == "global"
    everybody = comm if shared else None
    by_score = config.priority == "score"
    made_TK = (
        torch.ones_like(routing.expert_TK, dtype=torch.bool)
        if routing.keep_TK is None
        else routing.keep_TK
    )
    score_TK = priority_score(routing.score_TE.gather(1, routing.expert_TK)) if by_score else None
    queued_TK = made_TK & ~routing.is_zero_cost_TK if routing.num_zero_cost else made_TK
    places = queue_positions(
        Assignments(routing.expert_TK, queued_TK, score_TK, groups, num_experts), everybody
    )
    fits_TK = places.global_position_TK < context.capacity
    keep_TK = (
        made_TK & (fits_TK | routing.is_zero_cost_TK)
        if routing.num_zero_cost
        else made_TK & fits_TK
    )
    limited = replace(
        routing,
        keep_TK=keep_TK,
        slot_TK=places.local_position_TK,
        capacity=min(context.capacity, tokens) if shared else context.capacity,
        groups=groups,
        slots=context.capacity
        * groups
        * (num_experts - routing.num_zero_cost)
        / (comm.size if shared else 1),
    )
    if config.overflow == "next_choice":
        limited = next_choice(
            limited, made_TK & ~keep_TK, places, context.capacity, by_score, everybody
        )
    return replace(limited, weight_TK=surviving_weight(limited, config.renormalize))


def surviving_weight(limited: Routing, renormalize: bool) -> Tensor:
    """Weights with the dropped ones zero; survivors keep theirs, or are divided by their sum (DeepSpeed for K >= 2), then scaled."""
    assert limited.keep_TK is not None
    kept_TK = limited.weight_TK.masked_fill(~limited.keep_TK, 0.0)
    if not renormalize:
        return kept_TK
    return kept_TK / (kept_TK.sum(-1, keepdim=True) + 1e-20) * limited.scale


def apply_capacity_reference(
    routing: Routing, config: CapacityConfig, groups: int, capacity: int
) -> tuple[Tensor, Tensor]:
    """`keep_TK` and `expert_TK` of `limit`, by walking each group's line in order, obviously right. For tests.

    For group `global` give it the tokens of all ranks, in rank order, as one group.
    """
    keep_TK, expert_TK = (
        torch.zeros_like(routing.expert_TK, dtype=torch.bool),
        routing.expert_TK.clone(),
    )
    made = torch.ones_like(keep_TK) if routing.keep_TK is None else routing.keep_TK
    tokens, top_k = routing.expert_TK.shape
    for group in range(groups):
        members = range(group * (tokens // groups), (group + 1) * (tokens // groups))
        taken = [0] * routing.score_TE.shape[1]
        line = [(k, t, int(expert_TK[t, k])) for k in range(top_k) for t in members if made[t, k]]
        queued = len(taken) - routing.num_zero_cost
        for k, t, expert in line:
            keep_TK[t, k] = expert >= queued
        line = [(k, t, expert) for k, t, expert in line if expert < queued]
        late = _fill_slots(line, routing, config, capacity, taken, keep_TK, expert_TK)
        if config.overflow == "next_choice":
            assert routing.next_expert_TS is not None
            offers = []
            for t in members:
                spares = routing.next_expert_TS[t].tolist()
                offers += [
                    (k, t, e)
                    for k, e in zip(sorted(k for k, u, _ in late if u == t), spares, strict=False)
                    if e >= 0
                ]
            _fill_slots(sorted(offers), routing, config, capacity, taken, keep_TK, expert_TK)
    return keep_TK, expert_TK


def _fill_slots(
    assignments: list[tuple[int, int, int]],
    routing: Routing,
    config: CapacityConfig,
    capacity: int,
    taken: list[int],
    keep_TK: Tensor,
    expert_TK: Tensor,
) -> list[tuple[int, int, int]]:
    """Serve a line of (choice, token, expert) in order; fills the last three; returns who went away with nothing."""
    if config.priority == "score":
        assignments = sorted(
            assignments, key=lambda kte: -float(priority_score(routing.score_TE[kte[1], kte[2]]))
        )
    late = []
    for k, t, expert in assignments:
        if taken[expert] < capacity:
            taken[expert] += 1
            keep_TK[t, k], expert_TK[t, k] = True, expert
        else:
            late.append((k, t, expert))
    return late


def next_choice(
    limited: Routing,
    overflow_TK: Tensor,
    first: QueuePositions,
    capacity: int,
    by_score: bool,
    comm: DataParallelComm | None,
) -> Routing:
    """`limited` (whose `keep_TK` and `slot_TK` are the first round's) after `overflow_TK` had their second chance."""
    offered_TK, spare_TK, weight_TK = next_choices(limited, overflow_TK)
    score_TK = priority_score(limited.score_TE.gather(1, spare_TK)) if by_score else None
    num_experts = limited.score_TE.shape[1]
    second = queue_positions(
        Assignments(spare_TK, offered_TK, score_TK, limited.groups, num_experts), comm
    )

    assert limited.keep_TK is not None
    assert limited.slot_TK is not None
    own_GE = count_per_expert(limited.expert_TK, limited.keep_TK, limited.groups, num_experts)
    # everybody of the first round stands ahead; where they were more than C, nobody behind them fits anyway
    taken_TK = offered_TK & (
        per_token(first.length_GE, spare_TK) + second.global_position_TK < capacity
    )
    # behind this rank's own first round, again without a gap: the slots stay a prefix
    slot_TK = per_token(own_GE, spare_TK) + second.local_position_TK
    return replace(
        limited,
        expert_TK=torch.where(taken_TK, spare_TK, limited.expert_TK),
        weight_TK=torch.where(taken_TK, weight_TK, limited.weight_TK),
        slot_TK=torch.where(taken_TK, slot_TK, limited.slot_TK),
        keep_TK=limited.keep_TK | taken_TK,
    )


def next_choices(routing: Routing, overflow_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Who is offered an expert (bool), which one, and the weight it would have: all [T, K]."""
    if routing.next_expert_TS is None or routing.next_weight_TS is None:
        raise ValueError(
            "capacity.overflow='next_choice' needs a router that ranks the experts it did not choose; this one does not"
        )
    spares = routing.next_expert_TS.shape[1]
    if spares == 0:  # every expert was chosen: there is none left to offer
        return (
            torch.zeros_like(overflow_TK),
            torch.zeros_like(routing.expert_TK),
            torch.zeros_like(routing.weight_TK),
        )
    nth_TK = overflow_TK.to(torch.int64).cumsum(1) - 1
    index_TK = nth_TK.clamp(0, spares - 1)
    spare_TK = routing.next_expert_TS.gather(1, index_TK)
    offered_TK = overflow_TK & (nth_TK < spares) & (spare_TK >= 0)
    return offered_TK, spare_TK.clamp(min=0), routing.next_weight_TS.gather(1, index_TK)


def per_token(value_GE: Tensor, expert_TK: Tensor) -> Tensor:
    """[T, K]: each token's group's value of the expert."""
    groups, num_experts = value_GE.shape
    group_T1 = group_of_token(len(expert_TK), groups, expert_TK.device).unsqueeze(1)
    return value_GE.flatten()[group_T1 * num_experts + expert_TK]
