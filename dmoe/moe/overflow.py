"""A second chance for assignments that found no slot: the token's next eligible expert.

The j-th overflowing assignment of a token (in order of preference) is offered once to the j-th expert after those the router chose,
`routing.spare_TK[t, j]`. It queues behind everybody who was served in the first round: by position in the order of the assignments
that overflowed (choice-major, then tokens), by score in the order of the *spare's* score. Who fits takes the slot and its expert
and weight replace the old ones; who does not is dropped as before. This is one round of "No-Token-Left-Behind" (Fedus et al. 2021,
Switch Transformers, appendix B, who saw no gain in quality from it: it is for models that must not drop).

Cost: one or two more stable sorts; with a capacity shared by all ranks one more all-gather, as large as the first round's. No host
sync.

Letters: T tokens, E experts, K experts a token, S spare experts a token, G groups, C slots of one (group, expert).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dmoe.moe.peers import DataParallelComm
from dmoe.moe.queues import Assignments, QueuePositions, count_per_expert, queue_positions, group_of_token, priority_score
from dmoe.moe.routing import Routing

__all__ = ["next_choice"]


def next_choice(
    limited: Routing, overflow_TK: Tensor, first: QueuePositions, capacity: int, by_score: bool, comm: DataParallelComm | None
) -> Routing:
    """`limited` (whose `keep_TK` and `slot_TK` are the first round's) after `overflow_TK` had their second chance."""
    offered_TK, spare_TK, weight_TK = next_choices(limited, overflow_TK)
    score_TK = priority_score(limited.score_TE.gather(1, spare_TK)) if by_score else None
    num_experts = limited.score_TE.shape[1]
    second = queue_positions(Assignments(spare_TK, offered_TK, score_TK, limited.groups, num_experts), comm)

    assert limited.keep_TK is not None
    assert limited.slot_TK is not None
    own_GE = count_per_expert(limited.expert_TK, limited.keep_TK, limited.groups, num_experts)
    # everybody of the first round stands ahead; where they were more than C, nobody behind them fits anyway
    taken_TK = offered_TK & (per_token(first.length_GE, spare_TK) + second.global_position_TK < capacity)
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
        return torch.zeros_like(overflow_TK), torch.zeros_like(routing.expert_TK), torch.zeros_like(routing.weight_TK)
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
