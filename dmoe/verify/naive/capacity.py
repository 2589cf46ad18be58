"""Expert capacity as an explicit queue; `dmoe/moe/capacity.py` does the same without loops.

Letters: T tokens, E experts.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dmoe.moe.layer import MoE

Assignment = tuple[int, int, int]
"""(token, index of the choice, expert)."""


@dataclass(frozen=True)
class Choices:
    """Experts of every token, best first: all that it chose, or those within capacity."""

    experts_T: list[list[int]]
    next_experts_T: list[list[int]]
    """Experts that each token would choose next, best first."""
    logit_TE: Tensor
    score_TE: Tensor
    weight_TE: Tensor
    """Combine weight of every expert, chosen or not."""
    valid_T: list[bool]
    slots: float = 0.0
    clean_TE: Tensor | None = None
    """Logits before noise, for the noisy router."""
    std_TE: Tensor | None = None

    def mask(self, like: Tensor) -> Tensor:
        """Return the chosen experts as a boolean tensor [T, E]."""
        mask_TE = torch.zeros_like(like, dtype=torch.bool)
        for t, experts in enumerate(self.experts_T):
            mask_TE[t, experts] = True
        return mask_TE


def has_capacity(layer: MoE) -> bool:
    """Return True if a capacity factor applies in the layer's present mode."""
    return _factor(layer) is not None


def _factor(layer: MoE) -> float | None:
    return layer.capacity.factor if layer.training else layer.capacity.eval_factor


def apply_capacity(layer: MoE, choices: Choices, sequences: int) -> Choices:
    """Return `choices` without the dropped ones; a rerouted choice is added to its token."""
    if not has_capacity(layer):
        return choices
    tokens = len(choices.experts_T)
    capacity, groups = capacity_and_groups(layer, tokens, sequences)
    kept: list[list[int]] = [[] for _ in range(tokens)]
    for g in range(groups):
        group = range(g * tokens // groups, (g + 1) * tokens // groups)
        for t, e in _fill_slots(layer, choices, group, capacity):
            kept[t].append(e)
    for t, chosen in enumerate(choices.experts_T):
        # zero-cost experts have no queue
        kept[t] += [e for e in chosen if e >= layer.experts.num_experts]
    slots = float(capacity * groups * layer.experts.num_experts)
    return replace(choices, experts_T=kept, slots=slots)


def capacity_and_groups(
    layer: MoE, tokens: int, sequences: int, default_factor: float | None = None
) -> tuple[int, int]:
    """Return the slots of one expert in one group, and the number of groups.

    Args:
        layer: gives the capacity config, top_k and the number of experts.
        tokens: T.
        sequences: B, the number of groups if `capacity.group` is `sequence`.
        default_factor: capacity factor for a layer that has none.
    """
    factor = default_factor if (own := _factor(layer)) is None else own
    assert factor is not None
    groups = {"rank": layer.virtual_ranks, "sequence": sequences, "global": 1}[layer.capacity.group]
    fair_share = layer.top_k * (tokens // groups) / layer.num_experts
    wanted = max(layer.capacity.min_capacity, math.ceil(round(factor * fair_share, 9)))
    return min(tokens // groups, wanted), groups


def _fill_slots(
    layer: MoE, choices: Choices, tokens: range, capacity: int
) -> list[tuple[int, int]]:
    """Return the kept (token, expert) pairs: first choices in order, then rerouted overflow.

    First choices fill the slots that their expert need not share, then those left in its pool.
    """
    most = max((len(choices.experts_T[t]) for t in tokens), default=0)
    assignments = [
        (t, k, choices.experts_T[t][k])
        for k in range(most)
        for t in tokens
        if k < len(choices.experts_T[t])
    ]
    assignments = [(t, k, e) for t, k, e in assignments if e < layer.experts.num_experts]
    pool, floor = layer.capacity.pool, math.floor(round(layer.capacity.pool_floor * capacity, 9))
    own, shared = Counter[int](), Counter[int]()
    kept, waiting, overflowed = list[tuple[int, int]](), list[Assignment](), list[tuple[int, int]]()

    def fill(t: int, e: int, free: bool) -> bool:
        if free:
            own[e], shared[e // pool] = own[e] + 1, shared[e // pool] + 1
            kept.append((t, e))
        return free

    for t, k, e in _by_priority(layer, choices, assignments):
        if not fill(t, e, own[e] < floor):
            waiting.append((t, k, e))
    for t, k, e in waiting:
        if not fill(t, e, shared[e // pool] < pool * capacity):
            overflowed.append((t, k))
    if layer.capacity.overflow == "next_choice":
        for t, _, e in _by_priority(layer, choices, _next_choices(choices, overflowed)):
            fill(t, e, shared[e // pool] < pool * capacity)
    return kept


def _next_choices(choices: Choices, overflowed: list[tuple[int, int]]) -> list[Assignment]:
    """Assign the j-th overflowed choice of a token to its j-th next expert.

    The result is in order of choice, then of token.
    """
    rerouted = []
    for t in sorted({t for t, _ in overflowed}):
        own = sorted(k for other, k in overflowed if other == t)
        rerouted += [(t, k, e) for k, e in zip(own, choices.next_experts_T[t], strict=False)]
    return sorted(rerouted, key=lambda assignment: (assignment[1], assignment[0]))


def _by_priority(layer: MoE, choices: Choices, assignments: list[Assignment]) -> list[Assignment]:
    if layer.capacity.priority == "position":
        return assignments
    # the comparison is defined in float32, see priority_score() in dmoe/moe/expert_queue.py
    score_TE = choices.score_TE.to(torch.float32).tolist()
    return sorted(assignments, key=lambda item: -score_TE[item[0]][item[2]])
