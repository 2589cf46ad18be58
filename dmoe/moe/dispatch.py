"""Token permutation (token order <-> expert order), and the dispatchers of one process.

The layer does not know which rank holds an expert. Here all experts are local; the dispatchers of
`distributed/all_to_all.py` wrap the same permutations with an all-to-all, so that sorting, dropping
and summing are one piece of code on one process and on many GPUs.

Both directions know the inverse permutation, so forward and backward are gathers and sums over K,
never an atomic scatter: deterministic on every device, and faster. `embedding_bag` is torch's
gather-and-weighted-sum kernel for CPU and CUDA; it accumulates in float32 whatever the rows' dtype.

Letters: T tokens, D width, E experts, e local experts (E/EP), K experts per token, N = T*K
assignments, R rows in expert order, G groups, C slots of one (group, expert).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import embedding_bag
from torch.profiler import record_function

from dmoe.moe.expert_queue import per_token
from dmoe.moe.interfaces import TokensPerExpert
from dmoe.moe.routing import DispatchPlan, count_per_expert, group_of_token

STAGES = ("route", "dispatch", "exchange", "experts", "combine")
"""Profiler ranges of a layer."""
NO_RANGE: AbstractContextManager[None] = nullcontext()


def profiled(stage: str) -> AbstractContextManager[object]:
    """Open a profiler range; a no-op unless a profiler runs on this thread.

    `record_function` costs about 14 microseconds per use even without a profiler (torch 2.13); this
    check costs less than one, so layers can always use it.
    """
    is_profiling: bool = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    return record_function(stage) if is_profiling else NO_RANGE


class PackedLocal:
    """Exchanges exactly the rows there are, within one process.

    Host syncs: none if dropless, one (the number of rows) with drops or padding.
    """

    def dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> tuple[Tensor, TokensPerExpert, Any]:
        permutation, count_E = packed_permutation(plan)
        if plan.keep_TK is not None:
            permutation = permutation.first_rows(int(count_E.sum()))
        return permute(x_TD, permutation), count_E, permutation

    def combine(self, rows_RD: Tensor, weight_TK: Tensor, metadata: Any) -> Tensor:
        return unpermute(rows_RD, weight_TK, metadata)


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


@dataclass(frozen=True)
class Permutation:
    """The row of every assignment and its inverse; int64 or bool tensors on the tokens' device."""

    assignment_R: Tensor
    """The assignment n = t*K + k of each row; meaningless where `filled_R` is False."""
    row_TK: Tensor
    """The row of each assignment; where it has none, one of its token's own rows, else 0."""
    keep_TK: Tensor | None
    """Which assignments have a row. None: all."""
    filled_R: Tensor | None
    """Which rows hold an assignment (padded slots may be empty). None: all."""

    @cached_property
    def token_R(self) -> Tensor:
        """int64: the token of each row."""
        return self.assignment_R // self.row_TK.shape[1]

    def first_rows(self, count: int) -> Permutation:
        """Return the permutation without the rows of dropped assignments, which are last."""
        return replace(self, assignment_R=self.assignment_R[:count])


def packed_permutation(plan: DispatchPlan) -> tuple[Permutation, Tensor]:
    """Sort assignments by expert, in token order within an expert, dropped ones last. No host sync.

    O(N log N).

    Returns:
        The permutation, of N rows: with drops, cut it by `first_rows(count_E.sum())`.
        `count_E`, int64 [E]: rows per expert.
    """
    # fewer digits for a radix sort
    small = torch.uint8 if plan.num_experts < 255 else torch.int32
    expert_N = plan.expert_TK.to(small).flatten()
    if plan.keep_TK is not None:
        expert_N = expert_N.masked_fill(~plan.keep_TK.flatten(), plan.num_experts)
    sorted_N, order_N = expert_N.sort(stable=True)
    edge_E = torch.searchsorted(
        sorted_N, torch.arange(plan.num_experts + 1, dtype=small, device=expert_N.device)
    )
    row_N = torch.empty_like(order_N).scatter_(
        0, order_N, torch.arange(len(order_N), device=order_N.device)
    )
    row_TK = row_N.view_as(plan.expert_TK)
    if plan.keep_TK is not None:
        row_TK = own_rows(row_TK, plan.keep_TK)
    return Permutation(order_N, row_TK, plan.keep_TK, None), edge_E.diff()


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
    assignment_R.scatter_(0, target_N, torch.arange(empty, device=row_TK.device))
    assignment_R = assignment_R[:rows]
    filled_R = assignment_R < empty
    assignment_R = assignment_R.masked_fill(~filled_R, 0)
    return Permutation(assignment_R, own_rows(row_TK, keep_TK), keep_TK, filled_R)


def own_rows(row_TK: Tensor, keep_TK: Tensor) -> Tensor:
    """Replace the row of each dropped assignment by a row of the same token, 0 if it has none.

    A gather must read some row, at weight 0; 0 x NaN is NaN, so that row is no other token's.
    """
    own_TK = row_TK.masked_fill(~keep_TK, 0)
    return torch.where(keep_TK, row_TK, own_TK.amax(1, keepdim=True)) if own_TK.numel() else own_TK


def permute(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """Copy each row's token vector, rows_RD; empty slots are zero.

    Backward sums each token's K row gradients.
    """
    out: Tensor = _Permute.apply(x_TD, permutation)
    return out


def unpermute(rows_RD: Tensor, weight_TK: Tensor, permutation: Permutation) -> Tensor:
    """Sum `weight * row` over each token's kept assignments, y_TD.

    In the rows' dtype, accumulated in float32 (float64 for float64).
    """
    out: Tensor = _Unpermute.apply(rows_RD, weight_TK, permutation)
    return out


class _Permute(Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return _rows_of_tokens(x_TD, permutation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        permutation: Permutation = ctx.permutation
        weight_TK = None if permutation.keep_TK is None else permutation.keep_TK.to(grads[0].dtype)
        return sum_over_choices(grads[0], weight_TK, permutation), None


class _Unpermute(Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weight_TK: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        ctx.save_for_backward(rows_RD, weight_TK)
        if permutation.keep_TK is not None:
            weight_TK = weight_TK.masked_fill(~permutation.keep_TK, 0.0)
        return sum_over_choices(rows_RD, weight_TK.to(rows_RD.dtype), permutation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_RD, weight_TK = ctx.saved_tensors
        permutation: Permutation = ctx.permutation
        grad_RD = _rows_of_tokens(grads[0], permutation)
        weight_R = weight_TK.flatten()[permutation.assignment_R].to(grad_RD.dtype)
        if permutation.filled_R is not None:
            weight_R = weight_R.masked_fill(~permutation.filled_R, 0.0)
        if rows_RD.is_cuda:
            grad_weight_TK = _row_dots(grad_RD, rows_RD, permutation)
        else:
            grad_weight_TK = _weight_grads(grads[0], rows_RD, permutation)
        grad_weight_TK = grad_weight_TK.to(weight_TK.dtype)
        return grad_RD.mul_(weight_R.unsqueeze(1)), grad_weight_TK, None


def _rows_of_tokens(x_TD: Tensor, permutation: Permutation) -> Tensor:
    rows_RD = x_TD.index_select(0, permutation.token_R)
    if permutation.filled_R is None:
        return rows_RD
    return rows_RD.masked_fill_(~permutation.filled_R.unsqueeze(1), 0.0)


def sum_over_choices(rows_RD: Tensor, weight_TK: Tensor | None, permutation: Permutation) -> Tensor:
    """Sum each token's rows, times their weights in the rows' dtype (None: all 1), [T, D]."""
    if len(rows_RD) == 0:
        # nothing was kept on this rank: its tokens still get zeros, and the graph stays connected
        return rows_RD.new_zeros(len(permutation.row_TK), rows_RD.shape[1])
    sum_TD = embedding_bag(permutation.row_TK, rows_RD, per_sample_weights=weight_TK, mode="sum")
    if permutation.keep_TK is None:
        return sum_TD
    # a token that keeps nothing has read row 0, which is another token's
    return sum_TD.masked_fill_(~permutation.keep_TK.any(1, keepdim=True), 0.0)


def _weight_grads(grad_TD: Tensor, rows_RD: Tensor, permutation: Permutation) -> Tensor:
    """Compute the dot product of each token's gradient with each of its rows, [T, K].

    Calls the kernel behind `embedding_bag`'s own backward: no R x D product is written, and it
    accumulates in float32 (`vecdot` rounds each product to bf16 first). For the CPU: on CUDA it
    has no bf16 form before torch 2.13 (pytorch/pytorch#185808).
    """
    tokens, top_k = permutation.row_TK.shape
    if len(rows_RD) == 0:
        return rows_RD.new_zeros(tokens, top_k)
    start_T = torch.arange(0, tokens * top_k, top_k, device=rows_RD.device)
    token_N = torch.arange(tokens, device=rows_RD.device).repeat_interleave(top_k)
    row_N = permutation.row_TK.flatten()
    dot_N = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad_TD.contiguous(), rows_RD, row_N, start_T, token_N, 0
    )
    dot_TK: Tensor = dot_N.view(tokens, top_k)
    return dot_TK if permutation.keep_TK is None else dot_TK.masked_fill(~permutation.keep_TK, 0.0)


MAX_BATCH = 65_535
"""Largest batch of one `torch.bmm`: cuBLAS has left what follows unset (pytorch/pytorch#25241)."""


def _row_dots(grad_RD: Tensor, rows_RD: Tensor, permutation: Permutation) -> Tensor:
    """Compute `_weight_grads` on CUDA, from the gradients that the backward has gathered already.

    Batched products accumulate in float32 and write one number per row.
    """
    if len(rows_RD) == 0:
        return rows_RD.new_zeros(permutation.row_TK.shape)
    batches = zip(grad_RD.split(MAX_BATCH), rows_RD.split(MAX_BATCH), strict=True)
    dots = [torch.bmm(g.unsqueeze(1), r.unsqueeze(2)) for g, r in batches]
    dot_TK = (dots[0] if len(dots) == 1 else torch.cat(dots)).flatten()[permutation.row_TK]
    return dot_TK if permutation.keep_TK is None else dot_TK.masked_fill(~permutation.keep_TK, 0.0)


def expert_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of experts and exchanged rows: autocast's, else the input's."""
    device = x.device.type
    # meta does not support autocast
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype
