"""Token permutation into fixed slots, for exchanges whose shapes follow from the config.

Letters: T tokens, D width, E experts, e local experts (E/EP), K experts per token, N = T*K
assignments, R rows in expert order, G groups, C slots of one (group, expert).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmoe.moe.dispatch import Permutation, own_rows, permute, unpermute
from dmoe.moe.expert_queue import per_token
from dmoe.moe.interfaces import TokensPerExpert
from dmoe.moe.routing import DispatchPlan, count_per_expert, group_of_token


class PaddedLocal:
    """Computes G*C rows per expert, empty slots zero, within one process; pooled: one block.

    Every shape follows from the config. No host sync.
    """

    def dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> tuple[Tensor, TokensPerExpert, Any]:
        assert plan.slots is not None, "the padded exchange needs a capacity"
        if plan.slots.pool > 1:
            permutation, count_1E = pooled_rows(plan, 1)
            unused_1 = len(permutation.assignment_R) - count_1E.sum(1)
            return permute(x_TD, permutation), torch.cat([count_1E[0], unused_1]), permutation
        permutation = padded_permutation(plan)
        return permute(x_TD, permutation), plan.slots.rows_per_expert, permutation

    def combine(self, rows_RD: Tensor, weight_TK: Tensor, metadata: Any) -> Tensor:
        return unpermute(rows_RD, weight_TK, metadata)


def padded_permutation(plan: DispatchPlan) -> Permutation:
    """Place assignments in fixed slots: row `(e*G + g)*C + s` is slot s of expert e for group g.

    So R = E*G*C follows from shapes alone. No host sync.
    """
    assert plan.slots is not None, "padded slots need a capacity"
    capacity, groups = plan.slots.capacity, plan.slots.groups
    group_T1 = group_of_token(len(plan.expert_TK), groups, plan.expert_TK.device).unsqueeze(1)
    row_TK = (plan.expert_TK * groups + group_T1) * capacity + plan.slots.position_TK
    return _scattered(plan, row_TK, plan.num_experts * groups * capacity)


def pooled_rows(plan: DispatchPlan, ranks: int, extra: int = 0) -> tuple[Permutation, Tensor]:
    """Place assignments in one block of rows per EP rank, sorted by expert, group and slot.

    A block has `rows_per_rank` rows, unused ones last, and `extra` that nothing fills: so its size
    follows from shapes alone. No host sync. Returns the rows of each expert too, [ranks, e].
    """
    assert plan.slots is not None, "padded slots need a capacity"
    slots, per_rank = plan.slots, plan.num_experts // ranks
    block = slots.rows_per_rank + extra
    count_GE = count_per_expert(plan.expert_TK, plan.is_kept_TK, slots.groups, plan.num_experts)
    count_Pn = count_GE.t().reshape(ranks, per_rank * slots.groups)
    first_EG = (count_Pn.cumsum(1) - count_Pn).view(plan.num_experts, slots.groups)
    row_TK = plan.expert_TK // per_rank * block + slots.position_TK
    row_TK = row_TK + per_token(first_EG.t().contiguous(), plan.expert_TK)
    return _scattered(plan, row_TK, ranks * block), count_GE.sum(0).view(ranks, per_rank)


def _scattered(plan: DispatchPlan, row_TK: Tensor, rows: int) -> Permutation:
    """Return the permutation of `rows` rows that puts the kept assignments into `row_TK`."""
    keep_TK, empty = plan.is_kept_TK, plan.expert_TK.numel()
    # dropped assignments write to one extra entry behind the last row
    target_N = row_TK.masked_fill(~keep_TK, rows).flatten()
    assignment_R = torch.full((rows + 1,), empty, dtype=torch.int64, device=row_TK.device)
    assignment_R.scatter_(0, target_N, plan.ranges.get(empty, row_TK.device))
    assignment_R = assignment_R[:rows]
    filled_R = assignment_R < empty
    row_TK = own_rows(row_TK, keep_TK)
    more = (plan.ranges, plan.kernels)
    return Permutation(assignment_R, row_TK, keep_TK, filled_R, *more)
