"""Carrying tokens to experts and back: the protocol, and the two dispatchers that need no communication.

The layer does not know where experts live. Here all of them are local; `distributed/all_to_all.py` wraps these same two with an
all-to-all, so that what is sorted, dropped and summed is one piece of code on one process and on a thousand GPUs.

Letters: T tokens, D width, E experts, e experts here (E/EP), K experts a token, R rows, G groups, C slots of one (group, expert).

Token order <-> expert order, and back.

Both directions know the inverse permutation, so forward *and* backward are gathers and sums over K, never an atomic scatter:
deterministic on every device, and faster. `embedding_bag` is the gather-and-weighted-sum kernel that torch has on CPU and CUDA;
it adds in float32 whatever the rows' dtype.

Letters: T tokens, D width, E experts, K experts a token, N = T*K assignments, R rows in expert order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import embedding_bag

from dmoe.moe.routing import Routing

TokensPerExpert = Tensor | int
"""Rows of each local expert: an int64 tensor [e], or one number where all have equally many (padded slots: no host read)."""


class Dispatcher(Protocol):
    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, TokensPerExpert, Any]:
        """rows_RD grouped by local expert, how many each has, and a ticket that `combine` takes back."""
        ...

    def combine(self, rows_RD: Tensor, weight_TK: Tensor, metadata: Any) -> Tensor:
        """y_TD, the weighted sum over each token's kept choices, at the rank the tokens came from."""
        ...


class PackedLocal:
    """Exactly the rows there are. Dropless costs no host sync; with drops or padding, one (the number of rows)."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, TokensPerExpert, Any]:
        placement, count_E = packed_permutation(routing)
        if routing.keep_TK is not None:
            placement = placement.first_rows(int(count_E.sum()))
        return permute(x_TD, placement), count_E, placement

    def combine(self, rows_RD: Tensor, weight_TK: Tensor, metadata: Any) -> Tensor:
        return unpermute(rows_RD, weight_TK, metadata)


class PaddedLocal:
    """Exactly G*C rows an expert, empty slots zero: every shape is known from the config. No host sync."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, TokensPerExpert, Any]:
        placement = padded_permutation(routing)
        assert routing.capacity is not None
        return permute(x_TD, placement), routing.groups * routing.capacity, placement

    def combine(self, rows_RD: Tensor, weight_TK: Tensor, metadata: Any) -> Tensor:
        return unpermute(rows_RD, weight_TK, metadata)


@dataclass(frozen=True)
class Permutation:
    """Where every assignment's row stands. All tensors are int64 or bool, on the tokens' device."""

    assignment_R: Tensor
    """The assignment n = t*K + k behind each row; meaningless where `filled_R` is False."""
    row_TK: Tensor
    """The row of each assignment; 0 where it has none."""
    keep_TK: Tensor | None
    """Which assignments have a row; None means all."""
    filled_R: Tensor | None
    """Which rows hold an assignment (padded slots may be empty); None means all."""

    @property
    def token_R(self) -> Tensor:
        return self.assignment_R // self.row_TK.shape[1]

    def first_rows(self, count: int) -> Permutation:
        return replace(self, assignment_R=self.assignment_R[:count])


def packed_permutation(routing: Routing) -> tuple[Permutation, Tensor]:
    """Rows sorted by expert, in token order within an expert, dropped assignments last; and `count_E` (int64), rows of each expert.

    The placement has N rows: cut it with `first_rows(sum of count_E)` where something was dropped. O(N log N), no host sync.
    """
    num_experts = routing.num_physical_experts
    expert_N = routing.expert_TK.flatten()
    if routing.keep_TK is not None:
        expert_N = expert_N.masked_fill(~routing.keep_TK.flatten(), num_experts)
    sorted_N, order_N = expert_N.sort(stable=True)
    edge_E = torch.searchsorted(sorted_N, torch.arange(num_experts + 1, device=expert_N.device))
    row_N = torch.empty_like(order_N).scatter_(
        0, order_N, torch.arange(len(order_N), device=order_N.device)
    )
    if routing.keep_TK is not None:
        row_N = row_N.masked_fill(~routing.keep_TK.flatten(), 0)
    return Permutation(
        order_N, row_N.view_as(routing.expert_TK), routing.keep_TK, None
    ), edge_E.diff()


def padded_permutation(routing: Routing) -> Permutation:
    """Fixed slots: row `(e*G + g)*C + s` is slot s of expert e for group g, so R = E*G*C is known from shapes alone. No host sync."""
    assert routing.slot_TK is not None, "padded placement needs a capacity"
    assert routing.keep_TK is not None
    assert routing.capacity is not None
    tokens, top_k = routing.expert_TK.shape
    capacity, groups, num_experts = routing.capacity, routing.groups, routing.num_physical_experts
    rows = num_experts * groups * capacity
    group_T1 = torch.arange(tokens, device=routing.expert_TK.device).unsqueeze(1) // (
        tokens // groups
    )
    row_TK = (routing.expert_TK * groups + group_T1) * capacity + routing.slot_TK
    target_N = row_TK.masked_fill(
        ~routing.keep_TK, rows
    ).flatten()  # the dropped ones write one entry behind the last slot
    empty = tokens * top_k
    assignment_R = torch.full((rows + 1,), empty, dtype=torch.int64, device=row_TK.device)
    assignment_R = assignment_R.scatter_(0, target_N, torch.arange(empty, device=row_TK.device))[
        :rows
    ]
    filled_R = assignment_R < empty
    return Permutation(
        assignment_R.masked_fill(~filled_R, 0),
        row_TK.masked_fill(~routing.keep_TK, 0),
        routing.keep_TK,
        filled_R,
    )


def permute(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """rows_RD: each row a copy of its token's vector, empty slots zero. Backward sums each token's K row gradients."""
    out: Tensor = _Permute.apply(x_TD, permutation)
    return out


def unpermute(rows_RD: Tensor, weight_TK: Tensor, permutation: Permutation) -> Tensor:
    """y_TD = sum over a token's kept choices of `weight * row`; in the rows' dtype, added in float32 (float64 for float64)."""
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
        return _sum_over_choices(grads[0], weight_TK, permutation), None


class _Unpermute(Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weight_TK: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        ctx.save_for_backward(rows_RD, weight_TK)
        weight_TK = (
            weight_TK
            if permutation.keep_TK is None
            else weight_TK.masked_fill(~permutation.keep_TK, 0.0)
        )
        return _sum_over_choices(rows_RD, weight_TK.to(rows_RD.dtype), permutation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_RD, weight_TK = ctx.saved_tensors
        permutation: Permutation = ctx.permutation
        grad_RD = _rows_of_tokens(grads[0], permutation)
        weight_R = weight_TK.flatten()[permutation.assignment_R].to(grad_RD.dtype)
        return (
            grad_RD.mul_(weight_R.unsqueeze(1)),
            _weight_grads(grads[0], rows_RD, permutation).to(weight_TK.dtype),
            None,
        )


def _rows_of_tokens(x_TD: Tensor, permutation: Permutation) -> Tensor:
    rows_RD = x_TD.index_select(0, permutation.token_R)
    return (
        rows_RD
        if permutation.filled_R is None
        else rows_RD.masked_fill_(~permutation.filled_R.unsqueeze(1), 0.0)
    )


def _sum_over_choices(
    rows_RD: Tensor, weight_TK: Tensor | None, permutation: Permutation
) -> Tensor:
    if (
        len(rows_RD) == 0
    ):  # nothing survived on this rank: the tokens still get their zeros, and the graph stays whole
        return rows_RD.new_zeros(len(permutation.row_TK), rows_RD.shape[1])
    return embedding_bag(permutation.row_TK, rows_RD, per_sample_weights=weight_TK, mode="sum")


def _weight_grads(grad_TD: Tensor, rows_RD: Tensor, permutation: Permutation) -> Tensor:
    """[T, K]: each token's gradient times each of its rows.

    The kernel behind `embedding_bag`'s own backward: no product of R x D is ever written, and it adds in float32 (`vecdot` rounds
    each product to bf16 first).
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


def permute_reference(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """`gather`, one row at a time. For tests."""
    filled = (
        [True] * len(permutation.assignment_R)
        if permutation.filled_R is None
        else permutation.filled_R.tolist()
    )
    rows = [
        x_TD[t] if full else torch.zeros_like(x_TD[0])
        for t, full in zip(permutation.token_R.tolist(), filled, strict=True)
    ]
    return torch.stack(rows) if rows else x_TD[:0]


def unpermute_reference(rows_RD: Tensor, weight_TK: Tensor, permutation: Permutation) -> Tensor:
    """`combine`, one token and choice at a time. For tests."""
    tokens = []
    for t, rows in enumerate(permutation.row_TK.tolist()):
        total = rows_RD.new_zeros(rows_RD.shape[1])
        for k, row in enumerate(rows):
            if permutation.keep_TK is None or bool(permutation.keep_TK[t, k]):
                total = total + weight_TK[t, k] * rows_RD[row]
        tokens.append(total)
    return torch.stack(tokens) if tokens else rows_RD.new_zeros(0, rows_RD.shape[1])
