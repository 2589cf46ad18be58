"""Triton kernels that move rows: gather (permute), weighted sum (unpermute) and its backward.

Each has the torch form of `moe/dispatch.py` as its reference and launches once where that launches
three to seven kernels. Sums and dot products accumulate in float32 (float64 for float64), in a
fixed order, without atomics: deterministic.

Letters: T tokens, D width, K experts per token, N = T*K assignments, R rows in expert order.
"""

# Triton's language has no types
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 1024
"""Most columns that one program holds at a time."""


@triton.jit
def _gather(x, token, filled, out, width, HAS_FILLED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    is_read = inside
    if HAS_FILLED:
        is_read = column < width * tl.load(filled + row).to(tl.int32)
    value = tl.load(x + tl.load(token + row) * width + column, mask=is_read, other=0.0)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum(
    rows,
    row_of,
    weight,
    keep,
    out,
    width,
    TOP_K: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], dtype=ACCUMULATE)
    for choice in range(TOP_K):
        assignment = token * TOP_K + choice
        is_read = inside
        if HAS_KEEP:
            # a dropped choice is not read at all: 0 x NaN is NaN
            is_read = column < width * tl.load(keep + assignment).to(tl.int32)
        row = tl.load(row_of + assignment)
        value = tl.load(rows + row * width + column, mask=is_read, other=0.0).to(ACCUMULATE)
        if HAS_WEIGHT:
            factor = tl.load(weight + assignment).to(rows.dtype.element_ty).to(ACCUMULATE)
            value = tl.where(is_read, value * factor, 0.0)
        total += value
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_backward(
    grad,
    rows,
    weight,
    assignment_of,
    filled,
    grad_rows,
    grad_weight,
    width,
    TOP_K: tl.constexpr,
    HAS_FILLED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    assignment = tl.load(assignment_of + row)
    if HAS_FILLED:
        # an empty row has the assignment behind the last one
        assignment = assignment * tl.load(filled + row).to(tl.int64)
    token = assignment // TOP_K
    factor = tl.load(weight + assignment).to(rows.dtype.element_ty).to(ACCUMULATE)
    dot = tl.zeros([BLOCK], dtype=ACCUMULATE)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        is_read = inside
        if HAS_FILLED:
            is_read = column < width * tl.load(filled + row).to(tl.int32)
        g = tl.load(grad + token * width + column, mask=is_read, other=0.0).to(ACCUMULATE)
        x = tl.load(rows + row * width + column, mask=is_read, other=0.0).to(ACCUMULATE)
        dot += g * x
        scaled = tl.where(is_read, g * factor, 0.0).to(grad_rows.dtype.element_ty)
        tl.store(grad_rows + row * width + column, scaled, mask=inside)
    total = tl.sum(dot, 0).to(grad_weight.dtype.element_ty)
    if HAS_FILLED:
        # the assignment of an unfilled row is another row's
        tl.store(grad_weight + assignment, total, mask=tl.load(filled + row) != 0)
    else:
        tl.store(grad_weight + assignment, total)


def gather_rows(x_TD: Tensor, token_R: Tensor, filled_R: Tensor | None) -> Tensor:
    """Copy each row's token vector, [R, D] in the dtype of `x_TD`; unfilled rows are zero.

    One launch.
    """
    x_TD = x_TD.contiguous()
    rows, width = len(token_R), x_TD.shape[1]
    out_RD = x_TD.new_empty(rows, width)
    if out_RD.numel():
        block = block_of(width)
        _gather[(rows, triton.cdiv(width, block))](
            x_TD,
            token_R,
            token_R if filled_R is None else filled_R,
            out_RD,
            width,
            HAS_FILLED=filled_R is not None,
            BLOCK=block,
        )
    return out_RD


def sum_rows(
    rows_RD: Tensor, row_TK: Tensor, weight_TK: Tensor | None, keep_TK: Tensor | None
) -> Tensor:
    """Sum each token's kept rows, times their weights rounded to the rows' dtype, [T, D].

    One launch.
    """
    rows_RD, (tokens, top_k), width = rows_RD.contiguous(), row_TK.shape, rows_RD.shape[1]
    out_TD = rows_RD.new_empty(tokens, width)
    if not len(rows_RD):
        return out_TD.zero_()
    if out_TD.numel():
        block = block_of(width)
        _sum[(tokens, triton.cdiv(width, block))](
            rows_RD,
            row_TK.contiguous(),
            row_TK if weight_TK is None else weight_TK.contiguous(),
            row_TK if keep_TK is None else keep_TK.contiguous(),
            out_TD,
            width,
            TOP_K=top_k,
            HAS_WEIGHT=weight_TK is not None,
            HAS_KEEP=keep_TK is not None,
            ACCUMULATE=accumulator(rows_RD.dtype),
            BLOCK=block,
        )
    return out_TD


def sum_rows_backward(
    grad_TD: Tensor,
    rows_RD: Tensor,
    weight_TK: Tensor,
    assignment_R: Tensor,
    filled_R: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `sum_rows`: of the rows, [R, D], and of the weights, [T, K].

    The gradient of a dropped weight is 0. One launch, and one that clears where rows are fewer or
    more than the assignments.
    """
    grad_TD, rows_RD, weight_TK = (t.contiguous() for t in (grad_TD, rows_RD, weight_TK))
    rows, width = rows_RD.shape
    grad_RD, grad_TK = torch.empty_like(rows_RD), torch.empty_like(weight_TK)
    if rows < weight_TK.numel() or filled_R is not None:
        grad_TK.zero_()
    if rows:
        _sum_backward[(rows,)](
            grad_TD,
            rows_RD,
            weight_TK,
            assignment_R,
            assignment_R if filled_R is None else filled_R,
            grad_RD,
            grad_TK,
            width,
            TOP_K=weight_TK.shape[1],
            HAS_FILLED=filled_R is not None,
            ACCUMULATE=accumulator(rows_RD.dtype),
            BLOCK=block_of(width),
        )
    return grad_RD, grad_TK


def accumulator(dtype: torch.dtype) -> Any:
    """Return Triton's dtype of sums over numbers of `dtype`."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def block_of(width: int) -> int:
    """Return how many columns a program holds: a power of two, as Triton wants."""
    power: int = triton.next_power_of_2(max(width, 1))
    return min(MAX_BLOCK, power)
