"""Who finds a slot, by standing in line. See dmoe/moe/capacity.py for the same without loops."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dmoe.moe.layer import MoE


@dataclass(frozen=True)
class Choices:
    """For every token the experts it chose, best first, or those it kept."""

    experts_T: list[list[int]]
    spare_T: list[list[int]]
    """For every token the experts it would choose next, best first."""
    logit_TE: Tensor
    score_TE: Tensor
    weight_TE: Tensor
    """The combine weight each expert has, or, for a spare one, would have."""
    valid_T: list[bool]
    slots: float = 0.0
    clean_TE: Tensor | None = None
    std_TE: Tensor | None = None

    def mask(self, like: Tensor) -> Tensor:
        mask_TE = torch.zeros_like(like, dtype=torch.bool)
        for t, experts in enumerate(self.experts_T):
            mask_TE[t, experts] = True
        return mask_TE


def keep(layer: MoE, decision: Choices, sequences: int) -> Choices:
    """`decision` with only what found a slot; a rerouted choice stands where the overflowing one stood."""
    if (layer.capacity.factor if layer.training else layer.capacity.eval_factor) is None:
        return decision
    tokens = len(decision.experts_T)
    capacity, groups = slots(layer, tokens, sequences)
    kept: list[list[int]] = [[] for _ in range(tokens)]
    for g in range(groups):
        for t, e in _serve(
            layer, decision, range(g * tokens // groups, (g + 1) * tokens // groups), capacity
        ):
            kept[t].append(e)
    for t, chosen in enumerate(
        decision.experts_T
    ):  # who chose an expert that costs nothing stands in no line
        kept[t] += [e for e in chosen if e >= layer.experts.num_experts]
    return replace(
        decision, experts_T=kept, slots=float(capacity * groups * layer.experts.num_experts)
    )


def slots(
    layer: MoE, tokens: int, sequences: int, otherwise: float | None = None
) -> tuple[int, int]:
    """Slots of one (group, expert), and the number of groups. `otherwise` is the factor where the layer has none."""
    factor = layer.capacity.factor if layer.training else layer.capacity.eval_factor
    factor = otherwise if factor is None else factor
    assert factor is not None
    groups = {"rank": layer.virtual_ranks, "sequence": sequences, "global": 1}[layer.capacity.group]
    fair_share = layer.top_k * (tokens // groups) / layer.num_experts
    return min(
        tokens // groups, max(layer.capacity.min_capacity, math.ceil(round(factor * fair_share, 9)))
    ), groups


def _serve(layer: MoE, decision: Choices, tokens: range, capacity: int) -> list[tuple[int, int]]:
    """(token, expert) of every choice that is served, first comers first; then, once, the overflow at its next choice."""
    longest = max((len(decision.experts_T[t]) for t in tokens), default=0)
    line = [
        (t, k, decision.experts_T[t][k])
        for k in range(longest)
        for t in tokens
        if k < len(decision.experts_T[t])
    ]
    line = [(t, k, e) for t, k, e in line if e < layer.experts.num_experts]
    taken, served = dict[int, int](), list[tuple[int, int]]()
    overflow = list[tuple[int, int]]()
    for t, k, e in _sorted(layer, decision, line):
        if taken.get(e, 0) < capacity:
            taken[e] = taken.get(e, 0) + 1
            served.append((t, e))
        else:
            overflow.append((t, k))
    if layer.capacity.overflow == "next_choice":
        for t, _, e in _sorted(layer, decision, _next_choices(decision, overflow)):
            if taken.get(e, 0) < capacity:
                taken[e] = taken.get(e, 0) + 1
                served.append((t, e))
    return served


def _next_choices(decision: Choices, overflow: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """The j-th overflowing choice of a token is offered to its j-th spare expert; in choice order, then token order."""
    offers = []
    for t in sorted({t for t, _ in overflow}):
        turned_away = sorted(k for other, k in overflow if other == t)
        offers += [(t, k, e) for k, e in zip(turned_away, decision.spare_T[t], strict=False)]
    return sorted(offers, key=lambda offer: (offer[1], offer[0]))


def _sorted(
    layer: MoE, decision: Choices, line: list[tuple[int, int, int]]
) -> list[tuple[int, int, int]]:
    if layer.capacity.priority == "position":
        return line
    score_TE = decision.score_TE.to(
        torch.float32
    ).tolist()  # the comparison is defined in float32, see queues.serving_score
    return sorted(line, key=lambda item: -score_TE[item[0]][item[2]])
