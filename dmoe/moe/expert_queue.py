"""Where each assignment stands in the queue of its expert, on one rank and over all of them.

Two places matter. `place_TK` counts everybody ahead in the queue that shares the capacity: it decides who is served. `slot_TK`
counts only this rank's own: it says in which slot of the padded exchange the row travels.

    3 ranks, the queue of one expert     a a b a c b c | b ...    C = 7, the letter is the rank
    place of each                        0 1 2 3 4 5 6 | 7
    slot, on its own rank                0 1 0 2 0 1 1 | 2

Both follow one order, and a rank's own assignments are a subsequence of the shared queue: so place grows with slot, those with
`place < C` are the *first* of each rank's own queue, and their slots are 0, 1, 2, ... without a gap, at most min(C, T) of them.

Letters: T tokens here, E experts, K experts a token, N = T*K assignments, G groups, C slots of one (group, expert), W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmoe.moe.comm import DataParallelComm


@dataclass(frozen=True)
class Assignments:
    """Assignments that look for a slot."""

    expert_TK: Tensor
    """int64; anything in [0, E) where nobody waits."""
    active_TK: Tensor
    """bool: which of the T*K places in line are taken at all."""
    score_TK: Tensor | None
    """Who is served first; None: position, which is all first choices before all second ones, then token order (GShard)."""
    groups: int
    num_experts: int


@dataclass(frozen=True)
class QueuePositions:
    """All int64; meaningless where nobody waits."""

    local_position_TK: Tensor
    """Own assignments of the same (group, expert) that are served earlier."""
    global_position_TK: Tensor
    """The same over all ranks that share the capacity."""
    length_GE: Tensor
    """Everybody who waits for (group, expert), over all ranks that share the capacity."""


def priority_score(score: Tensor) -> Tensor:
    """What a queue by score compares: the score in float32, whatever the model's precision.

    Two tokens that are the same (the first ones of two sequences, say) have scores that are equal but for the last bit, and that bit
    depends on the shape of the product they came from, so on the number of ranks. Rounding a float64 model's scores makes them the
    tie they are, which position then decides. In a float32 model nothing is left to round: `dmoe verify` calls such a case undecided.
    """
    return score.detach().to(torch.float32)


def queue_positions(assignments: Assignments, comm: DataParallelComm | None) -> QueuePositions:
    """The places of this rank's assignments. `peers` are the ranks that share the capacity; None: each rank has its own.

    Cost: none without peers. With them one all-gather: by position of K*E int64 a rank; by score of 2*T*K scores a rank, and every
    rank sorts all W*T*K (each expert's threshold could be found by bisection with O(1) memory a rank, in some 30 collectives
    instead of one). No host sync.
    """
    if comm is None:
        slot_TK = local_positions(assignments)
        return QueuePositions(
            slot_TK,
            slot_TK,
            count_per_expert(
                assignments.expert_TK,
                assignments.active_TK,
                assignments.groups,
                assignments.num_experts,
            ),
        )
    assert assignments.groups == 1, "a capacity shared by all ranks has one group"
    return (
        positions_by_position(assignments, comm)
        if assignments.score_TK is None
        else positions_by_score(assignments, comm)
    )


def positions_by_position(assignments: Assignments, comm: DataParallelComm) -> QueuePositions:
    """The order is (choice k, rank, token). So ahead of an assignment stand its own rank's, which `slot` counts already, the earlier
    choices of all *other* ranks, and the same choice of the *earlier* ranks: an exclusive prefix over the ranks' [K, E] counts."""
    by_choice = (
        assignments.expert_TK.t().reshape(-1, 1),
        assignments.active_TK.t().reshape(-1, 1),
    )  # K groups of T
    count_KE = count_per_expert(*by_choice, assignments.expert_TK.shape[1], assignments.num_experts)
    count_WKE = comm.gather(count_KE)
    others_KE = count_WKE.sum(0) - count_KE
    earlier_choice_KE = others_KE.cumsum(0) - others_KE
    earlier_rank_KE = count_WKE[: comm.rank].sum(0)
    ahead_KE = earlier_choice_KE + earlier_rank_KE
    slot_TK = local_positions(assignments)
    ahead_TK = ahead_KE.t().gather(0, assignments.expert_TK)
    return QueuePositions(slot_TK, slot_TK + ahead_TK, count_WKE.sum((0, 1)).unsqueeze(0))


def positions_by_score(assignments: Assignments, comm: DataParallelComm) -> QueuePositions:
    """Everybody's scores in one line, ordered like one rank's: ties by (choice k, rank, token), exactly."""
    assert assignments.score_TK is not None
    tokens, top_k = assignments.expert_TK.shape
    expert_TK = assignments.expert_TK.masked_fill(
        ~assignments.active_TK, assignments.num_experts
    )  # the id that nobody has: not waiting
    # one gather for both: float32 holds every integer up to 2^24
    both_W2TK = comm.gather(
        torch.stack([assignments.score_TK, expert_TK.to(assignments.score_TK.dtype)])
    )
    score_MK = both_W2TK[:, 0].reshape(comm.size * tokens, top_k)
    expert_MK = both_W2TK[:, 1].reshape(comm.size * tokens, top_k).to(torch.int64)
    waiting_MK = expert_MK < assignments.num_experts
    world = Assignments(
        expert_MK.masked_fill(~waiting_MK, 0), waiting_MK, score_MK, 1, assignments.num_experts
    )
    place_TK = local_positions(world)[comm.rank * tokens : (comm.rank + 1) * tokens]
    return QueuePositions(
        local_positions(assignments),
        place_TK,
        count_per_expert(world.expert_TK, waiting_MK, 1, assignments.num_experts),
    )


def local_positions(assignments: Assignments) -> Tensor:
    """int64 [T, K]: how many of these assignments stand before this one in the queue of its (group, expert).

    O(N log N) by stable sorts, so the order is the same on every device.
    """
    tokens, top_k = assignments.expert_TK.shape
    group_T = group_of_token(tokens, assignments.groups, assignments.expert_TK.device)
    queue_N = (
        group_T * assignments.num_experts + assignments.expert_TK.t()
    ).flatten()  # choice-major: that *is* the position order
    queue_N = queue_N.masked_fill(
        ~assignments.active_TK.t().flatten(), assignments.groups * assignments.num_experts
    )  # who waits for nothing waits elsewhere
    if assignments.score_TK is None:
        order_N = queue_N.sort(stable=True).indices
    else:
        by_score_N = assignments.score_TK.t().flatten().sort(descending=True, stable=True).indices
        order_N = by_score_N[queue_N[by_score_N].sort(stable=True).indices]
    sorted_N = queue_N[order_N]
    start_N = torch.searchsorted(sorted_N, sorted_N)  # first index of the same queue
    rank_N = torch.arange(tokens * top_k, device=order_N.device) - start_N
    position_N = torch.empty_like(rank_N).scatter_(0, order_N, rank_N)
    return position_N.view(top_k, tokens).t().contiguous()


def count_per_expert(expert_TK: Tensor, active_TK: Tensor, groups: int, num_experts: int) -> Tensor:
    """int64 [G, E]: assignments of each (group, expert) among `which_TK`. Integer atomics only: deterministic."""
    group_T = group_of_token(len(expert_TK), groups, expert_TK.device)
    queue_N = (group_T.unsqueeze(1) * num_experts + expert_TK).flatten()
    count_N = torch.zeros(groups * num_experts, dtype=torch.int64, device=expert_TK.device)
    return count_N.scatter_add_(0, queue_N, active_TK.flatten().to(torch.int64)).view(
        groups, num_experts
    )


def group_of_token(tokens: int, groups: int, device: torch.device) -> Tensor:
    """int64 [T]: groups are equal, contiguous runs of tokens."""
    return torch.arange(tokens, device=device) // max(1, tokens // groups)
