"""Capacity by walking each queue in order."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from dmoe.config.schema import CapacityConfig
from dmoe.moe.expert_queue import priority_score
from dmoe.moe.routing import Routing


def apply_capacity_reference(
    routing: Routing,
    config: CapacityConfig,
    groups: int,
    capacity: int,
    num_zero_cost: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute `keep_TK` and `expert_TK` of `apply_capacity`.

    For group `global`, pass the tokens of all ranks, in rank order, as one group.
    """
    keep_TK, expert_TK = (
        torch.zeros_like(routing.expert_TK, dtype=torch.bool),
        routing.expert_TK.clone(),
    )
    selected_TK = routing.is_selected_TK
    tokens, top_k = routing.expert_TK.shape
    for group in range(groups):
        members = range(group * (tokens // groups), (group + 1) * (tokens // groups))
        taken = [0] * routing.score_TE.shape[1]
        queue = [
            (k, t, int(expert_TK[t, k])) for k in range(top_k) for t in members if selected_TK[t, k]
        ]
        queued = len(taken) - num_zero_cost
        for k, t, expert in queue:
            keep_TK[t, k] = expert >= queued
        queue = [(k, t, expert) for k, t, expert in queue if expert < queued]
        floor = math.floor(Fraction(str(config.pool_floor)) * capacity)
        overflowed = _fill_slots(queue, routing, config, capacity, taken, keep_TK, expert_TK, floor)
        if config.overflow == "next_choice":
            assert routing.next_expert_TS is not None
            offers = []
            for t in members:
                next_experts = routing.next_expert_TS[t].tolist()
                offers += [
                    (k, t, e)
                    for k, e in zip(
                        sorted(k for k, u, _ in overflowed if u == t), next_experts, strict=False
                    )
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
    floor: int = 0,
) -> list[tuple[int, int, int]]:
    """Fill slots with (choice, token, expert) in order; return those that find none.

    The first `floor` of an expert are its own, the others its pool's. Updates `taken`, `keep_TK`
    and `expert_TK`.
    """
    if config.priority == "score":
        assignments = sorted(
            assignments, key=lambda kte: -float(priority_score(routing.score_TE[kte[1], kte[2]]))
        )
    waiting, overflowed = [], []
    for k, t, expert in assignments:
        if taken[expert] < floor:
            taken[expert] += 1
            keep_TK[t, k], expert_TK[t, k] = True, expert
        else:
            waiting.append((k, t, expert))
    for k, t, expert in waiting:
        first = expert - expert % config.pool
        if sum(taken[first : first + config.pool]) < config.pool * capacity:
            taken[expert] += 1
            keep_TK[t, k], expert_TK[t, k] = True, expert
        else:
            overflowed.append((k, t, expert))
    return overflowed
