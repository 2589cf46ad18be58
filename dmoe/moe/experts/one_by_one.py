"""The experts on a CPU: one by one, as one autograd function.

Between the two products of an expert its hidden rows are still in the cache, and no temporary is
larger than one expert's rows. Large ones cost more than arithmetic there: glibc returns a block
above 32 MiB to the system, so that the next one is page-faulted again.

From rows to rows (`rows_through_experts`), behind an exchange; or from tokens to tokens where all
experts are local (`tokens_through_experts`): then rows are gathered expert by expert, and neither
they nor the experts' outputs are kept for the backward, which gathers them again. The gradient of a
combine weight needs no output (SonicMoE, Guo et al. 2025):

    y_t = sum_k w_tk * a_tk W_out     ->     dL/dw_tk = (dL/dy_t W_out^T) . a_tk

with a_tk the activated hidden row, recomputed from the hidden row.

Behind an exchange rows may stay in the order of their source ranks: each expert gathers its own and
writes its output to their places, so that neither rows nor outputs are sorted as a whole.

Below float32 the rows of an expert are computed in a round number, zeros at the end: oneDNN keeps a
compiled primitive per shape (hundreds of MB, and a millisecond for each new one), and the numbers
of rows change in every step. At most one part in 16 is computed in vain.

Letters: T tokens, D input width, M output width, F hidden width, H = 2F for gated kinds, else F;
R rows, r rows of one expert, e local experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from dmoe.moe.dispatch import Permutation, profiled, sum_over_choices
from dmoe.moe.experts.activation import activate, activate_backward
from dmoe.moe.inputs import first_derivative_only

SendGradient = Callable[[Tensor], None]


class TokenRows(NamedTuple):
    """The rows of tokens and the weights of their sums, for experts that gather rows themselves."""

    permutation: Permutation
    """Packed, dropped rows last."""
    weight_TK: Tensor


def rows_through_experts(
    kind: str,
    rows_RD: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    sizes: list[int],
    send_gradient: SendGradient | None = None,
    order_R: Tensor | None = None,
) -> Tensor:
    """Compute `activation(rows @ w_in[e]) @ w_out[e]`, [R, D] -> [R, M].

    Args:
        kind: activation, a key of `ACTIVATIONS`.
        rows_RD: rows grouped by expert, or in any order with `order_R`.
        w_in: [e, D, H], of any dtype; computed in the rows'.
        w_out: [e, F, M].
        sizes: rows of each expert; after them maybe those of unused rows, whose result is zero.
        send_gradient: called with the rows' gradient before the weights' gradients are computed.
        order_R: int64, the places in `rows_RD` of the rows by expert: each place once. The result
            has the order of `rows_RD`.
    """
    out: Tensor = _OneByOne.apply(
        rows_RD, w_in, w_out, None, order_R, None, sizes, kind, send_gradient
    )
    return out


def tokens_through_experts(
    kind: str,
    x_TD: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    sizes: list[int],
    permutation: Permutation,
    weight_TK: Tensor,
) -> Tensor:
    """Compute the weighted sum over each token's kept experts, [T, D] -> [T, M].

    Equal to `permute`, `rows_through_experts` and `unpermute`. Keeps tokens and hidden rows.

    Args:
        kind: activation, a key of `ACTIVATIONS`.
        x_TD: tokens.
        w_in: [e, D, H], of any dtype; computed in the tokens'.
        w_out: [e, F, M].
        sizes: rows of each expert; their sum is at most the rows of `permutation`.
        permutation: packed; its rows are cut here.
        weight_TK: combine weights.
    """
    permutation = permutation.first_rows(sum(sizes))
    out: Tensor = _OneByOne.apply(
        x_TD, w_in, w_out, weight_TK, None, permutation, sizes, kind, None
    )
    return out


class _OneByOne(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        weight_TK: Tensor | None,
        order_R: Tensor | None,
        permutation: Permutation | None,
        sizes: list[int],
        kind: str,
        send_gradient: SendGradient | None,
    ) -> Tensor:
        blocks = _Blocks(sizes[: len(w_in)], x.dtype, permutation, order_R)
        out_RM = blocks.memory(x, w_out.shape[2])
        hidden = []
        for e, part in blocks:
            hidden.append(blocks.rows(x, part) @ w_in[e].to(x.dtype))
            blocks.write_product(activate(kind, hidden[-1]), w_out[e].to(x.dtype), out_RM, part)
        ctx.sizes, ctx.kind, ctx.permutation = blocks.sizes, kind, permutation
        ctx.send_gradient = send_gradient
        ctx.save_for_backward(x, w_in, w_out, weight_TK, order_R, *hidden)
        if permutation is None:
            return blocks.with_unused(out_RM, len(x))
        assert weight_TK is not None
        if permutation.keep_TK is not None:
            weight_TK = weight_TK.masked_fill(~permutation.keep_TK, 0.0)
        with profiled("combine"):
            return sum_over_choices(out_RM[: blocks.total], weight_TK.to(x.dtype), permutation)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w_in, w_out, weight_TK, order_R, *hidden = ctx.saved_tensors
        permutation, grad_y = ctx.permutation, grads[0]
        blocks = _Blocks(ctx.sizes, x.dtype, permutation, order_R)
        needs_x, needs_in, needs_out = ctx.needs_input_grad[:3]
        grad_in, grad_out = (
            torch.empty_like(weight) if needed else None
            for weight, needed in ((w_in, needs_in), (w_out, needs_out))
        )
        grad_rows = blocks.memory(x, x.shape[1]) if needs_x else None
        weight_R, dot_R = None, x.new_empty(blocks.end)
        if permutation is not None:
            weight_R = weight_TK.flatten()[permutation.assignment_R].to(x.dtype)
        delayed = list[Callable[[], None]]()
        for e, part in blocks:
            h, grad = hidden[e], blocks.rows(grad_y, part)
            weight_r = None if weight_R is None else blocks.pad(weight_R[part], len(h))
            activated, grad_h, dot_r = activate_backward(
                ctx.kind, h, grad @ w_out[e].to(x.dtype).t(), weight_r
            )
            if dot_r is not None:
                dot_R[blocks.padded(part)] = dot_r
            if grad_rows is not None:
                blocks.write_product(grad_h, w_in[e].to(x.dtype).t(), grad_rows, part)
            if grad_out is not None:
                delayed.append(partial(weight_grad, activated, grad, grad_out[e]))
            if grad_in is not None:
                rows = blocks.rows(x, part)
                delayed.append(partial(weight_grad, rows, grad_h, grad_in[e]))
            if ctx.send_gradient is None:
                _call(delayed)
        if permutation is None:
            grad_x = None if grad_rows is None else blocks.with_unused(grad_rows, len(x))
            if grad_x is not None and ctx.send_gradient is not None:
                ctx.send_gradient(grad_x)
            _call(delayed)
            return grad_x, grad_in, grad_out, *[None] * 6
        keep_TK, grad_x = permutation.keep_TK, None
        if grad_rows is not None:
            kept_TK = None if keep_TK is None else keep_TK.to(x.dtype)
            grad_x = sum_over_choices(grad_rows[: blocks.total], kept_TK, permutation)
        grad_weight_TK = dot_R[permutation.row_TK] if blocks.total else torch.zeros_like(weight_TK)
        if keep_TK is not None:
            grad_weight_TK = grad_weight_TK.masked_fill(~keep_TK, 0.0)
        return grad_x, grad_in, grad_out, grad_weight_TK.to(weight_TK.dtype), *[None] * 5


def _call(delayed: list[Callable[[], None]]) -> None:
    """Call all and forget them, and with them the rows that they hold."""
    for call in delayed:
        call()
    delayed.clear()


class _Blocks:
    """The rows of each expert, in round numbers below float32.

    Where results are grouped by expert, a padded block reaches into the next one, which is computed
    after it and overwrites its end.

    Args:
        sizes: rows of each expert.
        dtype: of the rows.
        permutation: the token of each row, where rows are gathered from tokens.
        order_R: the place of each row, where rows are in another order, and their results too.
    """

    def __init__(
        self,
        sizes: list[int],
        dtype: torch.dtype,
        permutation: Permutation | None = None,
        order_R: Tensor | None = None,
    ) -> None:
        self.sizes, self.total = sizes, sum(sizes)
        self.rounds = dtype.itemsize < 4
        self.order_R = order_R
        self.source_R = order_R if permutation is None else permutation.token_R
        ends = [self.padded(part).stop for _, part in self]
        self.end = max(ends, default=0)
        """Rows of a buffer that all padded blocks fit in."""

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        start = 0
        for e, size in enumerate(self.sizes):
            yield e, slice(start, start := start + size)

    def padded(self, part: slice) -> slice:
        """Return the rows of a block with those at its end."""
        size = part.stop - part.start
        if not self.rounds or not size:
            return part
        step = 1 << max(3, size.bit_length() - 5)
        return slice(part.start, part.start - (-size // step) * step)

    def rows(self, x: Tensor, part: slice) -> Tensor:
        """Return the rows of a block, gathered if they are elsewhere, with zeros at its end."""
        padded = self.padded(part)
        if self.source_R is None:
            return self.pad(x[part], padded.stop - padded.start)
        if padded == part:
            return x.index_select(0, self.source_R[part])
        rows = x.new_empty(padded.stop - padded.start, x.shape[1])
        size = part.stop - part.start
        torch.index_select(x, 0, self.source_R[part], out=rows[:size])
        rows[size:].zero_()
        return rows

    def memory(self, x: Tensor, width: int) -> Tensor:
        """Return memory for the results of all blocks, which `write_product` fills."""
        if self.order_R is None:
            return x.new_empty(self.end, width)
        is_full = self.total == len(x)
        return x.new_empty(len(x), width) if is_full else x.new_zeros(len(x), width)

    def write_product(self, left: Tensor, right: Tensor, out: Tensor, part: slice) -> None:
        """Write `left @ right` of a block, of its padded rows, to the places of its rows."""
        if self.order_R is None:
            torch.mm(left, right, out=out[self.padded(part)])
        else:
            # the product is still in the cache; autocast would change the dtype of `left @ right`
            rows = torch.mm(left, right, out=left.new_empty(len(left), out.shape[1]))
            out.index_copy_(0, self.order_R[part], rows[: part.stop - part.start])

    def with_unused(self, rows: Tensor, total: int) -> Tensor:
        """Return the results, `total` rows: zeros for the rows that no expert computes."""
        if self.order_R is not None:
            return rows
        if total == self.total:
            return rows[:total] if len(rows) > total else rows
        out = rows.new_zeros(total, rows.shape[1])
        out[: self.total] = rows[: self.total]
        return out

    def pad(self, rows: Tensor, size: int) -> Tensor:
        """Return the rows with zeros at the end."""
        if len(rows) == size:
            return rows
        padded = rows.new_zeros(size, *rows.shape[1:])
        padded[: len(rows)] = rows
        return padded


def weight_grad(rows_RI: Tensor, grad_RO: Tensor, out_IO: Tensor) -> None:
    """Write `rows^T @ grad` of one expert to `out_IO`, which may have a wider dtype.

    With AMX, oneDNN takes up to twice as long for a transposed left operand as for a copy of it and
    a plain product. Elsewhere the copy costs a quarter of the product and gains nothing.
    """
    left_IR = rows_RI.t()
    if rows_RI.element_size() < 4 and torch.cpu._is_amx_tile_supported():
        left_IR = left_IR.contiguous()
    if out_IO.dtype == rows_RI.dtype:
        torch.mm(left_IR, grad_RO, out=out_IO)
    else:
        out_IO.copy_(left_IR @ grad_RO)
