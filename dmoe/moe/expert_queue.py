"""Positions of assignments in the queues of their experts, on one rank and over all ranks.

`global_position_TK` counts the assignments ahead in the queue that shares the capacity: it decides
which assignments are kept. `local_position_TK` counts only those of this rank: it is the slot of
the row in the padded exchange.

    3 ranks, the queue of one expert     a a b a c b c | b ...    C = 7, the letter is the rank
    global position                      0 1 2 3 4 5 6 | 7
    local position                       0 1 0 2 0 1 1 | 2

Both follow one order, and a rank's assignments are a subsequence of the shared queue. So the global
position grows with the local one, the assignments with `global position < C` are the first ones of
each rank's own queue, and their local positions are 0, 1, 2, ... without a gap, at most min(C, T).

Letters: T tokens on this rank, E experts, K experts per token, N = T*K assignments, G groups, C
slots of one (group, expert), W data-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmoe.moe.interfaces import DataParallelComm
from dmoe.moe.routing import count_per_expert, group_of_token


@dataclass(frozen=True)
class Assignments:
    """Assignments that compete for slots."""

    expert_TK: Tensor
    """int64 in [0, E); arbitrary where inactive."""
    active_TK: Tensor
    """bool: which of the T*K assignments are in a queue."""
    score_TK: Tensor | None
    """Priority, highest first. None: by position, i.e. all first choices before all second choices,
    then token order (GShard)."""
    groups: int
    num_experts: int


@dataclass(frozen=True)
class QueuePositions:
    """Positions in the queues, int64; meaningless where inactive."""

    local_position_TK: Tensor
    """Assignments of this rank that are ahead in the same (group, expert)."""
    global_position_TK: Tensor
    """The same over all ranks that share the capacity."""
    length_GE: Tensor
    """Length of each queue, over all ranks that share the capacity."""


def priority_score(score: Tensor) -> Tensor:
    """Return the score by which a queue is sorted: float32, whatever the model's precision.

    Identical tokens (e.g. the first ones of two sequences) have scores that differ at most in the
    last bit, and that bit depends on the shape of the matrix product, so on the number of ranks.
    Rounding a float64 model's scores turns them into exact ties, which position then decides. In a
    float32 model nothing is left to round; `dmoe verify` reports such a case as undecided.
    """
    return score.detach().to(torch.float32)


def queue_positions(assignments: Assignments, comm: DataParallelComm | None) -> QueuePositions:
    """Return the queue positions of this rank's assignments; no host sync.

    Cost: without `comm` no collective. With it one all-gather: by position of K*E int64 per rank;
    by score of 2*T*K scores per rank, and every rank sorts all W*T*K (a bisection for each expert's
    threshold would need O(1) memory per rank, but some 30 collectives).

    Args:
        assignments: this rank's.
        comm: the ranks that share the capacity. None: each rank has its own capacity.
    """
    if comm is None:
        position_TK = local_positions(assignments)
        return QueuePositions(
            position_TK,
            position_TK,
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
        else positions_by_score(assignments, assignments.score_TK, comm)
    )


def positions_by_position(assignments: Assignments, comm: DataParallelComm) -> QueuePositions:
    """Return positions in the order (choice k, rank, token).

    Ahead of an assignment are its own rank's (its local position), the earlier choices of all other
    ranks, and the same choice of the earlier ranks: an exclusive prefix sum over the ranks' [K, E]
    counts.
    """
    # counted as K groups of T
    count_KE = count_per_expert(
        assignments.expert_TK.t().reshape(-1, 1),
        assignments.active_TK.t().reshape(-1, 1),
        assignments.expert_TK.shape[1],
        assignments.num_experts,
    )
    count_WKE = comm.gather(count_KE)
    others_KE = count_WKE.sum(0) - count_KE
    earlier_choice_KE = others_KE.cumsum(0) - others_KE
    earlier_rank_KE = count_WKE[: comm.rank].sum(0)
    ahead_KE = earlier_choice_KE + earlier_rank_KE
    position_TK = local_positions(assignments)
    ahead_TK = ahead_KE.t().gather(0, assignments.expert_TK)
    return QueuePositions(position_TK, position_TK + ahead_TK, count_WKE.sum((0, 1)).unsqueeze(0))


def positions_by_score(
    assignments: Assignments, score_TK: Tensor, comm: DataParallelComm
) -> QueuePositions:
    """Return positions by score; exact ties are in the order (choice k, rank, token)."""
    tokens, top_k = assignments.expert_TK.shape
    # id E marks inactive assignments
    expert_TK = assignments.expert_TK.masked_fill(~assignments.active_TK, assignments.num_experts)
    # one gather for scores and ids: float32 represents every integer up to 2^24
    both_W2TK = comm.gather(torch.stack([score_TK, expert_TK.to(score_TK.dtype)]))
    score_UK = both_W2TK[:, 0].reshape(comm.size * tokens, top_k)
    expert_UK = both_W2TK[:, 1].reshape(comm.size * tokens, top_k).to(torch.int64)
    active_UK = expert_UK < assignments.num_experts
    all_ranks = Assignments(
        expert_UK.masked_fill(~active_UK, 0), active_UK, score_UK, 1, assignments.num_experts
    )
    global_position_TK = local_positions(all_ranks)[comm.rank * tokens : (comm.rank + 1) * tokens]
    return QueuePositions(
        local_positions(assignments),
        global_position_TK,
        count_per_expert(all_ranks.expert_TK, active_UK, 1, assignments.num_experts),
    )


def local_positions(assignments: Assignments) -> Tensor:
    """Count the assignments ahead of each one in its (group, expert) queue, int64 [T, K].

    O(N log N) by stable sorts, so the order is the same on every device.
    """
    tokens, top_k = assignments.expert_TK.shape
    group_T = group_of_token(tokens, assignments.groups, assignments.expert_TK.device)
    # choice-major: this is the order by position
    queue_N = (group_T * assignments.num_experts + assignments.expert_TK.t()).flatten()
    # inactive assignments go to a dummy queue
    queue_N = queue_N.masked_fill(
        ~assignments.active_TK.t().flatten(), assignments.groups * assignments.num_experts
    )
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


def per_token(value_GE: Tensor, expert_TK: Tensor) -> Tensor:
    """Look up each assignment's (group, expert) value, [T, K]."""
    groups, num_experts = value_GE.shape
    group_T1 = group_of_token(len(expert_TK), groups, expert_TK.device).unsqueeze(1)
    return value_GE.flatten()[group_T1 * num_experts + expert_TK]
