"""Which of the router's choices find a slot.

An expert takes at most C assignments from each group of tokens; who comes later is dropped and its token keeps only its other
choices (or nothing: then the residual stream alone carries it). GShard (Lepikhin et al. 2020), Switch (Fedus et al. 2021).

Letters: T tokens, E experts, K experts a token, N = T*K assignments, G groups, C slots of one (group, expert).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from dmoe.config.schema import CapacityConfig
from dmoe.moe.peers import Peers
from dmoe.moe.routing import Routing, TokenContext

__all__ = ["limit", "limit_reference", "slots_per_expert"]


def slots_per_expert(factor: float, tokens: int, top_k: int, num_experts: int, min_capacity: int) -> int:
    """`C_g = max(min_capacity, ceil(factor * K * T_g / E))`, at most T_g: a token chooses an expert once at the most.

    T_g counts positions, padding included, so that C is known from shapes alone and the padded exchange needs no host read.
    """
    wanted = math.ceil(factor * top_k * tokens / num_experts - 1e-9)  # 1.1 * 10 is 11.000000000000002 and must not give 12
    return min(tokens, max(min_capacity, wanted))


def limit(routing: Routing, config: CapacityConfig, context: TokenContext, peers: Peers) -> Routing:
    """`routing` with `keep_TK` and `slot_TK` set: the first C assignments in each (group, expert) queue survive.

    Queue order: `position` = all first choices before all second choices, then token order (GShard); `score` = higher router
    score first, ties by position. Groups are equal contiguous runs of tokens. Dropless (`context.capacity` None) returns `routing`
    itself. No collective, no host sync; O(N log N) by stable sorts, so the order is the same on every device.
    """
    if context.capacity is None:
        return routing
    slot_TK = queue_position(routing, context.groups, config.priority)
    keep_TK = slot_TK < context.capacity
    if routing.keep_TK is not None:
        keep_TK = keep_TK & routing.keep_TK
    weight_TK = surviving_weight(routing, keep_TK, config.renormalize)
    slots = float(context.capacity * context.groups * routing.score_TE.shape[1])
    return replace(
        routing,
        weight_TK=weight_TK,
        keep_TK=keep_TK,
        slot_TK=slot_TK,
        capacity=context.capacity,
        groups=context.groups,
        slots=slots,
    )


def queue_position(routing: Routing, groups: int, priority: str) -> Tensor:
    """int64 [T, K]: how many assignments stand before this one in the queue of its (group, expert)."""
    tokens, top_k = routing.expert_TK.shape
    num_experts = routing.score_TE.shape[1]
    expert_KT = routing.expert_TK.t()
    group_T = torch.arange(tokens, device=expert_KT.device) // (tokens // groups)
    queue_N = (group_T * num_experts + expert_KT).flatten()  # choice-major: that *is* the position order
    if routing.keep_TK is not None:
        queue_N = queue_N.masked_fill(~routing.keep_TK.t().flatten(), groups * num_experts)  # choices not made wait elsewhere
    if priority == "score":
        score_N = routing.score_TE.detach().gather(1, routing.expert_TK).t().flatten()
        by_score_N = score_N.sort(descending=True, stable=True).indices
        order_N = by_score_N[queue_N[by_score_N].sort(stable=True).indices]
    else:
        order_N = queue_N.sort(stable=True).indices
    sorted_N = queue_N[order_N]
    start_N = torch.searchsorted(sorted_N, sorted_N)  # first index of the same queue
    rank_N = torch.arange(tokens * top_k, device=order_N.device) - start_N
    position_N = torch.empty_like(rank_N).scatter_(0, order_N, rank_N)
    return position_N.view(top_k, tokens).t().contiguous()


def surviving_weight(routing: Routing, keep_TK: Tensor, renormalize: bool) -> Tensor:
    """Weights with the dropped ones zero; survivors keep theirs, or are divided by their sum (DeepSpeed for K >= 2), then scaled."""
    kept_TK = routing.weight_TK.masked_fill(~keep_TK, 0.0)
    if not renormalize:
        return kept_TK
    return kept_TK / (kept_TK.sum(-1, keepdim=True) + 1e-20) * routing.scale


def limit_reference(routing: Routing, config: CapacityConfig, groups: int, capacity: int) -> Tensor:
    """`limit(...).keep_TK` by walking each queue in order, obviously right. For tests."""
    tokens, top_k = routing.expert_TK.shape
    per_group = tokens // groups
    keep_TK = torch.zeros(tokens, top_k, dtype=torch.bool)
    made = torch.ones_like(keep_TK) if routing.keep_TK is None else routing.keep_TK
    for group in range(groups):
        line = [(k, t) for k in range(top_k) for t in range(group * per_group, (group + 1) * per_group) if made[t, k]]
        if config.priority == "score":
            line.sort(key=lambda kt: -float(routing.score_TE[kt[1], routing.expert_TK[kt[1], kt[0]]]))
        taken: dict[int, int] = {}
        for k, t in line:
            expert = int(routing.expert_TK[t, k])
            if taken.get(expert, 0) < capacity:
                taken[expert] = taken.get(expert, 0) + 1
                keep_TK[t, k] = True
    return keep_TK
