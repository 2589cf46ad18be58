"""Expert capacity: which of the router's assignments find a slot.

An expert takes at most C assignments from each group of tokens. Assignments over capacity are
dropped; the token keeps its other experts (with none left, only the residual stream carries it).
GShard (Lepikhin et al. 2020), Switch (Fedus et al. 2021). `expert_queue.py` defines the order of a
queue.

With `overflow: next_choice`, dropped assignments get a second chance: the j-th overflowed
assignment of a token (in order of preference) is offered once to the j-th expert after those the
router selected, `routing.next_expert_TS[t, j]`. It queues behind all assignments of the first
round: by position in the order of the overflowed assignments (choice-major, then tokens), by score
in the order of the next expert's score. If it fits, the next expert and its weight replace the old
ones; otherwise it is dropped. This is one round of "No-Token-Left-Behind" (Fedus et al. 2021,
appendix B, who saw no gain in quality: it is for models that must not drop).

Cost of the second round: one or two more stable sorts; with a capacity shared by all ranks one more
all-gather, as large as the first round's. No host sync.

Letters: T tokens on this rank, E experts, K experts per token, S next experts per token, G groups,
C slots of one (group, expert).
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dmoe.config.schema import CapacityConfig
from dmoe.moe.expert_queue import (
    Assignments,
    QueuePositions,
    local_positions,
    per_token,
    priority_score,
    queue_positions,
)
from dmoe.moe.interfaces import DataParallelComm
from dmoe.moe.pooled_capacity import pooled, sum_over_pools, within_capacity
from dmoe.moe.routing import (
    BatchShape,
    DispatchPlan,
    ExpertSlots,
    Routing,
    count_per_expert,
)


def expert_capacity(
    factor: float, tokens: int, top_k: int, num_experts: int, min_capacity: int
) -> int:
    """Return the slots of one (group, expert).

        C_g = max(min_capacity, ceil(factor * K * T_g / E)), at most T_g

    (a token selects an expert at most once). T_g counts positions, padding included, so that C
    follows from shapes alone and the padded exchange needs no host read.

    Args:
        factor: capacity factor; 1 is the fair share.
        tokens: T_g, positions of the group.
        top_k: K.
        num_experts: E.
        min_capacity: lower bound of C.
    """
    # 1.1 * 10 is 11.000000000000002 and must not give 12
    wanted = math.ceil(factor * top_k * tokens / num_experts - 1e-9)
    return min(tokens, max(min_capacity, wanted))


def dropless_plan(routing: Routing, num_zero_cost: int = 0) -> DispatchPlan:
    """Return the plan that computes every selected assignment."""
    weight_TK, keep_TK = routing.weight_TK, routing.selected_TK
    if keep_TK is not None:
        # a copy for the backward: the caller may have filled its mask again before it
        keep_TK = keep_TK.clone()
        stop_dropped_gradients(routing, keep_TK)
        weight_TK = weight_TK.masked_fill(~keep_TK, 0.0)
    return DispatchPlan(
        routing.expert_TK,
        weight_TK,
        keep_TK,
        routing.num_experts,
        num_zero_cost,
        routed=(routing.expert_TK, routing.counts),
    )


def stop_dropped_gradients(routing: Routing, keep_TK: Tensor) -> None:
    """Make the logits' gradient zero where a token that is not finite keeps no expert.

    Its weights get zero gradient, but the backward of the gate multiplies it by the scores, and 0 x
    NaN is NaN. Gradients of finite logits are not touched. An auxiliary loss that counts such a
    token is NaN itself. No host sync.
    """
    noise = routing.noise
    lost_T1 = ~keep_TK.any(1, keepdim=True)
    for logit_TE in (routing.logit_TE, None if noise is None else noise.raw_TE):
        if logit_TE is not None and logit_TE.requires_grad:
            stop_T1 = lost_T1 & ~routing.logit_TE.detach().isfinite().all(1, keepdim=True)
            logit_TE.register_hook(partial(torch.masked_fill, mask=stop_T1, value=0.0))


class _Kept(NamedTuple):
    """One round's result: kept assignments, their experts, weights and local positions."""

    expert_TK: Tensor
    weight_TK: Tensor
    keep_TK: Tensor
    position_TK: Tensor


def apply_capacity(
    routing: Routing,
    shape: BatchShape,
    config: CapacityConfig,
    comm: DataParallelComm,
    num_zero_cost: int = 0,
) -> DispatchPlan:
    """Keep the first C assignments in the queue of each (group, expert). No host sync.

    Groups `rank` and `sequence` are equal, contiguous runs of this rank's tokens: no collective.
    Group `global` is the tokens of all ranks in rank order, equally many on each, and
    `shape.capacity` is their common C: one all-gather, and one more for `next_choice`
    (`expert_queue.queue_positions` states the size). Its plan has G = 1 and min(C, T) slots, the
    most an expert can get from this rank.

    Args:
        routing: the router's decision.
        shape: groups and capacity of this forward; `capacity` None is dropless.
        config: group, priority, overflow, renormalize.
        comm: all data-parallel ranks; used by group `global` only.
        num_zero_cost: number of zero-cost experts (highest ids): no queue, always kept.
    """
    if shape.capacity is None:
        return dropless_plan(routing, num_zero_cost)
    num_experts, (tokens, top_k) = routing.num_experts, routing.expert_TK.shape
    groups = max(1, shape.groups)  # a batch of no sequences has no groups
    shared = config.group == "global"
    queue_comm = comm if shared else None
    by_score = config.priority == "score"
    selected_TK = routing.is_selected_TK
    score_TK = priority_score(routing.score_TE.gather(1, routing.expert_TK)) if by_score else None
    has_queue_TK = routing.expert_TK < num_experts - num_zero_cost
    queued_TK = selected_TK & has_queue_TK if num_zero_cost else selected_TK
    queued = Assignments(routing.expert_TK, queued_TK, score_TK, groups, num_experts)
    positions = queue_positions(queued, queue_comm)
    fits_TK = within_capacity(queued, positions, shape.capacity, config, queue_comm)
    keep_TK = selected_TK & (fits_TK | ~has_queue_TK) if num_zero_cost else selected_TK & fits_TK
    kept = _Kept(routing.expert_TK, routing.weight_TK, keep_TK, positions.local_position_TK)
    if config.overflow == "next_choice":
        overflowed_TK = selected_TK & ~keep_TK
        kept = _reroute(routing, kept, overflowed_TK, positions, shape, config, queue_comm)
    slots = ExpertSlots(
        kept.position_TK,
        capacity=slots_of_rank(shape.capacity, tokens // groups, top_k, config),
        groups=groups,
        pool=config.pool,
        offered=shape.capacity
        * groups
        * (num_experts - num_zero_cost)
        / (comm.size if shared else 1),
    )
    stop_dropped_gradients(routing, kept.keep_TK)
    weight_TK = _kept_weights(kept.weight_TK, kept.keep_TK, routing.scale, config.renormalize)
    return DispatchPlan(kept.expert_TK, weight_TK, kept.keep_TK, num_experts, num_zero_cost, slots)


def slots_of_rank(capacity: int, tokens: int, top_k: int, config: CapacityConfig) -> int:
    """Return the slots that one rank can fill in one (group, expert), or (group, pool).

    Args:
        capacity: slots C of one (group, expert), over all ranks that share it.
        tokens: this rank's tokens of one group.
        top_k: K.
        config: group and pool.
    """
    if config.pool > 1:
        return min(config.pool * capacity, top_k * tokens)
    return min(capacity, tokens) if config.group == "global" else capacity


def _kept_weights(weight_TK: Tensor, keep_TK: Tensor, scale: float, renormalize: bool) -> Tensor:
    """Zero the weights of dropped assignments.

    `renormalize` divides the rest by their sum, times `scale` (DeepSpeed does for K >= 2).
    """
    kept_TK = weight_TK.masked_fill(~keep_TK, 0.0)
    if not renormalize:
        return kept_TK
    return kept_TK / (kept_TK.sum(-1, keepdim=True) + 1e-20) * scale


def _reroute(
    routing: Routing,
    first: _Kept,
    overflowed_TK: Tensor,
    positions: QueuePositions,
    shape: BatchShape,
    config: CapacityConfig,
    comm: DataParallelComm | None,
) -> _Kept:
    """Offer overflowed assignments to their token's next expert.

    Args:
        routing: the router's decision, with `next_expert_TS`.
        first: result of the first round.
        overflowed_TK: bool; selected assignments that the first round dropped.
        positions: queue positions of the first round.
        shape: groups, and slots C of one (group, expert) over all ranks that share it.
        config: priority (by score: the next expert's), and pool.
        comm: the ranks that share the capacity, or None.
    """
    assert shape.capacity is not None, "dropless: nothing overflows"
    groups, pool = max(1, shape.groups), config.pool
    offered_TK, next_TK, next_weight_TK = next_choices(routing, overflowed_TK)
    by_score = config.priority == "score"
    score_TK = priority_score(routing.score_TE.gather(1, next_TK)) if by_score else None
    offers = Assignments(next_TK, offered_TK, score_TK, groups, routing.num_experts)
    queue = pooled(offers, pool)
    second = queue_positions(queue, comm)
    # The whole first round is ahead. Where it exceeds the slots, nothing behind it fits anyway.
    ahead_TK = per_token(sum_over_pools(positions.length_GE, pool), queue.expert_TK)
    taken_TK = offered_TK & (ahead_TK + second.global_position_TK < pool * shape.capacity)
    # behind this rank's own first round, again without a gap: the slots stay a prefix
    own_GE = count_per_expert(first.expert_TK, first.keep_TK, groups, routing.num_experts)
    local_TK = second.local_position_TK if pool == 1 else local_positions(offers)
    position_TK = per_token(own_GE, next_TK) + local_TK
    return _Kept(
        expert_TK=torch.where(taken_TK, next_TK, first.expert_TK),
        weight_TK=torch.where(taken_TK, next_weight_TK, first.weight_TK),
        keep_TK=first.keep_TK | taken_TK,
        position_TK=torch.where(taken_TK, position_TK, first.position_TK),
    )


def next_choices(routing: Routing, overflowed_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return, each [T, K]: which assignments get an offer (bool), the expert offered, its weight.

    Raises:
        ValueError: the router gives no next experts.
    """
    if routing.next_expert_TS is None or routing.next_weight_TS is None:
        raise ValueError(
            "capacity.overflow='next_choice' needs a router that ranks the experts it did not "
            "select; this one does not"
        )
    count = routing.next_expert_TS.shape[1]
    if count == 0:  # every expert was selected: there is none left to offer
        return (
            torch.zeros_like(overflowed_TK),
            torch.zeros_like(routing.expert_TK),
            torch.zeros_like(routing.weight_TK),
        )
    nth_TK = overflowed_TK.to(torch.int64).cumsum(1) - 1
    index_TK = nth_TK.clamp(0, count - 1)
    next_TK = routing.next_expert_TS.gather(1, index_TK)
    offered_TK = overflowed_TK & (nth_TK < count) & (next_TK >= 0)
    return offered_TK, next_TK.clamp(min=0), routing.next_weight_TS.gather(1, index_TK)
