"""Code of the user's own in the naive layer and step: by its own reference, if it has one.

A class may have a `reference` beside what it must have, with the same arguments and results. Without
one the class itself is asked: then N ranks are compared with one process, not with a formula.

Letters: T tokens, E experts, K experts per token, S next experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.moe.layer import MoE
from dmoe.moe.routing import BatchShape, Routing, TokenContext
from dmoe.verify.naive.capacity import Choices, capacity_and_groups, has_capacity


def own_choices(
    layer: MoE, x_TD: Tensor, context: TokenContext, sequences: int, valid: list[bool]
) -> Choices:
    """Ask a router of the user's own: its `reference` if it has one, else its forward."""
    shape = BatchShape(sequences)
    if has_capacity(layer):
        capacity, groups = capacity_and_groups(layer, len(x_TD), sequences)
        shape = BatchShape(sequences, groups, capacity)
    decide = getattr(layer.router, "reference", layer.router.forward)
    routing: Routing = decide(x_TD, context, shape)
    selected_TK, next_TS = routing.is_selected_TK.tolist(), routing.next_expert_TS
    weight_TE = torch.zeros_like(routing.score_TE)
    weight_TE = weight_TE.scatter(1, routing.expert_TK, routing.weight_TK)
    following: list[list[int]] = [[] for _ in valid]
    if next_TS is not None and routing.next_weight_TS is not None:
        following = [[e for e in row if e >= 0] for row in next_TS.tolist()]
        exists_TS = (next_TS >= 0).to(weight_TE)
        weight_TE = weight_TE.scatter_add(
            1, next_TS.clamp(min=0), routing.next_weight_TS * exists_TS
        )
    experts = [
        [e for e, selected in zip(row, mask, strict=True) if selected]
        for row, mask in zip(routing.expert_TK.tolist(), selected_TK, strict=True)
    ]
    return Choices(experts, following, routing.logit_TE, routing.score_TE, weight_TE, valid)
