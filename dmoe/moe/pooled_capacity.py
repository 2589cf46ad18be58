"""Pooled capacity: P consecutive experts share the P*C slots that they have in a group.

An expert keeps the first F = floor(pool_floor * C) assignments of its own queue. The other slots of
the pool, P*C - sum_e min(n_e, F) with n_e the length of e's queue, go to the other assignments of
the pool's experts, in the order of one queue for all of them (`expert_queue.py`: by position or by
score). So an expert that overflows uses what the others of its pool leave empty; nothing is dropped
while the pool has an empty slot. The pool is a number of the config, not a rank: the dropped
assignments depend neither on EP nor on the number of ranks.

    2 experts, P = 2, C = 3                  queue of expert 0: a b c d e f    of expert 1: u v
    pool_floor 1, slots of their own         a b c | u v            one slot is left: d; drops e f
    pool 1                                   a b c | u v                          drops d e f

Both queues have one order, so an expert's kept assignments are the first of its own queue, and
their local positions are 0, 1, 2, ... without a gap, as without a pool.

Cost in addition: one more stable sort, and with a capacity shared by all ranks one more all-gather
as large as the first. No host sync.

Letters: T tokens on this rank, K experts per token, E experts, P experts of a pool, G groups.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor
from torch.nn.functional import pad

from dmoe.config.schema import CapacityConfig
from dmoe.moe.expert_queue import Assignments, QueuePositions, per_token, queue_positions
from dmoe.moe.interfaces import DataParallelComm


def pooled(assignments: Assignments, pool: int) -> Assignments:
    """Return the same assignments in the queues of their pools; zero-cost experts are in none."""
    if pool == 1:
        return assignments
    num_pools = -(-assignments.num_experts // pool)
    return replace(assignments, expert_TK=assignments.expert_TK // pool, num_experts=num_pools)


def sum_over_pools(count_GE: Tensor, pool: int) -> Tensor:
    """Sum a count per expert over each pool, [G, ceil(E/P)]."""
    padded_GE = pad(count_GE, (0, -count_GE.shape[1] % pool))
    return padded_GE.view(len(count_GE), -1, pool).sum(-1)


def within_capacity(
    assignments: Assignments,
    positions: QueuePositions,
    capacity: int,
    config: CapacityConfig,
    comm: DataParallelComm | None,
) -> Tensor:
    """Return which assignments find a slot, bool [T, K]; meaningless where inactive.

    Args:
        assignments: of the first round.
        positions: their queue positions.
        capacity: slots C of one (group, expert), over all ranks that share it.
        config: `pool` and `pool_floor`.
        comm: the ranks that share the capacity, or None.
    """
    if config.pool == 1:
        return positions.global_position_TK < capacity
    # 0.29 * 100 is 28.999999999999996 and must not give 28
    floor = math.floor(config.pool_floor * capacity + 1e-9)
    own_TK = positions.global_position_TK < floor
    others = pooled(replace(assignments, active_TK=assignments.active_TK & ~own_TK), config.pool)
    own_GP = sum_over_pools(positions.length_GE.clamp(max=floor), config.pool)
    position_TK = queue_positions(others, comm).global_position_TK
    taken_TK = per_token(own_GP, others.expert_TK) + position_TK
    return own_TK | (taken_TK < config.pool * capacity)
