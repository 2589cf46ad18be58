"""Token permutation (token order <-> expert order), and the dispatchers of one process.

The layer does not know which rank holds an expert. Here all experts are local; the dispatchers of
`distributed/all_to_all.py` wrap the same permutations with an all-to-all, so that sorting, dropping
and summing are one piece of code on one process and on many GPUs.

Both directions know the inverse permutation, so forward and backward are gathers and sums over K,
never an atomic scatter: deterministic on every device, and faster. `embedding_bag` is torch's
gather-and-weighted-sum kernel for CPU and CUDA; it accumulates in float32 whatever the rows' dtype.

Letters: T tokens, D width, E experts, e local experts (E/EP), K experts per token, N = T*K
assignments, R rows in expert order, G groups, C slots of one (group, expert), V = E + 1, W = E + 2.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.profiler import record_function

from dmoe.moe import kernels
from dmoe.moe.constants import IndexRanges
from dmoe.moe.inputs import first_derivative_only
from dmoe.moe.interfaces import TokensPerExpert
from dmoe.moe.routing import DispatchPlan

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


@dataclass(frozen=True)
class Permutation:
    """The row of every assignment and its inverse; int64 or bool tensors on the tokens' device."""

    assignment_R: Tensor
    """The assignment n = t*K + k of each row; N, behind the last one, where it is empty."""
    row_TK: Tensor
    """The row of each assignment; where it has none, one of its token's own rows, else 0."""
    keep_TK: Tensor | None
    """Which assignments have a row. None: all."""
    filled_R: Tensor | None
    """Which rows hold an assignment (padded slots may be empty). None: all."""
    ranges: IndexRanges = field(default_factory=IndexRanges, repr=False, compare=False)
    kernels: str = "torch"
    """`moe.kernels`: what moves the rows."""

    @property
    def offset_T(self) -> Tensor:
        """int64: the first of each token's assignments."""
        tokens, top_k = self.row_TK.shape
        return self.ranges.get(tokens, self.row_TK.device, step=top_k)

    @cached_property
    def token_R(self) -> Tensor:
        """int64: the token of each row; T, behind the last one, where it is empty."""
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
    ranges, device = plan.ranges, expert_N.device
    edge_W = torch.searchsorted(sorted_N, ranges.get(plan.num_experts + 2, device, small))
    position_N = ranges.get(len(order_N), device)
    row_N = torch.empty_like(order_N).scatter_(0, order_N, position_N)
    row_TK = row_N.view_as(plan.expert_TK)
    if plan.keep_TK is not None:
        row_TK = own_rows(row_TK, plan.keep_TK)
    # One launch: a caller may change the counts that a layer returns, and these are the rows' own.
    count_4V = edge_W.expand(4, -1).diff()
    plan.note_counts(count_4V[1:])
    permutation = Permutation(order_N, row_TK, plan.keep_TK, None, ranges, plan.kernels)
    return permutation, count_4V[0, :-1]


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
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        permutation: Permutation = ctx.permutation
        weight_TK = None
        if permutation.keep_TK is not None and permutation.kernels == "torch":
            weight_TK = permutation.keep_TK.to(grads[0].dtype)
        return sum_over_choices(grads[0], weight_TK, permutation), None


class _Unpermute(Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weight_TK: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation, ctx.weight_dtype = permutation, weight_TK.dtype
        if permutation.keep_TK is not None and permutation.kernels == "torch":
            weight_TK = weight_TK.masked_fill(~permutation.keep_TK, 0.0)
        weight_TK = weight_TK.to(rows_RD.dtype)
        ctx.save_for_backward(rows_RD, weight_TK)
        return sum_over_choices(rows_RD, weight_TK, permutation)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_RD, weight_TK = ctx.saved_tensors
        permutation: Permutation = ctx.permutation
        if len(weight_TK) == 0:
            # no token, though pooled slots send rows
            return torch.zeros_like(rows_RD), weight_TK.to(ctx.weight_dtype), None
        if permutation.kernels == "triton":
            more = (permutation.assignment_R, permutation.filled_R)
            grad_RD, grad_TK = kernels.sum_rows_backward(grads[0], rows_RD, weight_TK, *more)
            return grad_RD, grad_TK.to(ctx.weight_dtype), None
        grad_RD = _rows_of_tokens(grads[0], permutation)
        weight_N = weight_TK.flatten()
        if permutation.filled_R is not None:
            weight_N = with_zero_row(weight_N)
        weight_R = weight_N[permutation.assignment_R]
        if rows_RD.is_cuda:
            grad_weight_TK = row_dots_cuda(grad_RD, rows_RD, permutation)
        else:
            grad_weight_TK = row_dots_cpu(grads[0], rows_RD, permutation)
        grad_weight_TK = grad_weight_TK.to(ctx.weight_dtype)
        return grad_RD.mul_(weight_R.unsqueeze(1)), grad_weight_TK, None


def _rows_of_tokens(x_TD: Tensor, permutation: Permutation) -> Tensor:
    if len(x_TD) == 0:
        # pooled slots send rows that hold counts alone
        return x_TD.new_zeros(len(permutation.assignment_R), x_TD.shape[1])
    if permutation.kernels == "triton":
        return kernels.gather_rows(x_TD, permutation.token_R, permutation.filled_R)
    if permutation.filled_R is None:
        return x_TD.index_select(0, permutation.token_R)
    # Empty slots copy a row of zeros behind the tokens. To clear them would be a pass over all
    # rows, of which there are K times as many as tokens.
    return with_zero_row(x_TD).index_select(0, permutation.token_R)


def with_zero_row(tensor: Tensor) -> Tensor:
    """Return the tensor with zeros behind the last row."""
    return torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])])


def sum_over_choices(rows_RD: Tensor, weight_TK: Tensor | None, permutation: Permutation) -> Tensor:
    """Sum each token's rows, times their weights in the rows' dtype (None: all 1), [T, D]."""
    if len(rows_RD) == 0:
        # nothing was kept on this rank: its tokens still get zeros, and the graph stays connected
        return rows_RD.new_zeros(len(permutation.row_TK), rows_RD.shape[1])
    if permutation.kernels == "triton":
        return kernels.sum_rows(rows_RD, permutation.row_TK, weight_TK, permutation.keep_TK)
    row_N, weight_N = permutation.row_TK.flatten(), None
    if weight_TK is not None:
        weight_N = weight_TK.flatten()
    # not torch.nn.functional's, which makes the offsets in every call
    sum_TD: Tensor = torch.embedding_bag(
        rows_RD, row_N, permutation.offset_T, mode=0, per_sample_weights=weight_N
    )[0]
    if permutation.keep_TK is None:
        return sum_TD
    # a token that keeps nothing has read row 0, which is another token's
    return sum_TD.masked_fill_(~permutation.keep_TK.any(1, keepdim=True), 0.0)


def row_dots_cpu(grad_TD: Tensor, rows_RD: Tensor, permutation: Permutation) -> Tensor:
    """Compute the dot product of each token's gradient with each of its rows, [T, K].

    Calls the kernel behind `embedding_bag`'s own backward: no R x D product is written, and it
    accumulates in float32 (`vecdot` rounds each product to bf16 first). For the CPU: on CUDA it
    has no bf16 form before torch 2.13 (pytorch/pytorch#185808).
    """
    tokens, top_k = permutation.row_TK.shape
    if len(rows_RD) == 0:
        return rows_RD.new_zeros(tokens, top_k)
    token_N = torch.arange(tokens, device=rows_RD.device).repeat_interleave(top_k)
    row_N = permutation.row_TK.flatten()
    dot_N = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad_TD.contiguous(), rows_RD, row_N, permutation.offset_T, token_N, 0
    )
    dot_TK: Tensor = dot_N.view(tokens, top_k)
    return dot_TK if permutation.keep_TK is None else dot_TK.masked_fill(~permutation.keep_TK, 0.0)


MAX_BATCH = 65_535
"""Largest batch of one `torch.bmm`: cuBLAS has left what follows unset (pytorch/pytorch#25241)."""


def row_dots_cuda(grad_RD: Tensor, rows_RD: Tensor, permutation: Permutation) -> Tensor:
    """Compute `row_dots_cpu` on CUDA, from the gradients that the backward has gathered already.

    Batched products accumulate in float32 and write one number per row; below float32 they write
    it in float32, where the device has that product.
    """
    if len(rows_RD) == 0:
        return rows_RD.new_zeros(permutation.row_TK.shape)
    batches = zip(grad_RD.split(MAX_BATCH), rows_RD.split(MAX_BATCH), strict=True)
    product = partial(torch.bmm, out_dtype=torch.float32) if _is_wide(rows_RD) else torch.bmm
    dots = [product(g.unsqueeze(1), r.unsqueeze(2)) for g, r in batches]
    dot_TK = (dots[0] if len(dots) == 1 else torch.cat(dots)).flatten()[permutation.row_TK]
    return dot_TK if permutation.keep_TK is None else dot_TK.masked_fill(~permutation.keep_TK, 0.0)


def _is_wide(rows_RD: Tensor) -> bool:
    """Return whether `torch.bmm` can write float32: on a GPU (and on meta), from two bytes."""
    return rows_RD.dtype in (torch.bfloat16, torch.float16) and rows_RD.device.type != "cpu"


def expert_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of experts and exchanged rows: autocast's, else the input's."""
    device = x.device.type
    # meta does not support autocast
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off for the tensor's device, if it is on; the meta device has none."""
    if tensor.is_meta or not torch.is_autocast_enabled(tensor.device.type):
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)
