"""`rows @ weight[expert of the row]` for rows that are grouped by expert.

Letters: R rows, I input width, O output width, e experts here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import grouped_mm

from dmoe.moe.dispatch import TokensPerExpert

__all__ = ["grouped_linear", "grouped_linear_reference", "outer"]


def grouped_linear(rows_RI: Tensor, weight_eIO: Tensor, per_expert: TokensPerExpert) -> Tensor:
    """[R, O]. An expert without rows takes part with zero rows and gets a zero gradient.

    Equal groups (an int) are one batched GEMM. Unequal ones are `torch.nn.functional.grouped_mm` on CUDA, which reads the group
    ends on the device; on the CPU a loop of GEMMs that write straight into the result, measured at 0.6 times the time of
    `grouped_mm` there (benchmarks/layer.py), and which also takes float64.
    """
    if isinstance(per_expert, int):
        experts, width, out = weight_eIO.shape
        return torch.bmm(rows_RI.view(experts, per_expert, width), weight_eIO).view(experts * per_expert, out)
    result: Tensor = _GroupedLinear.apply(rows_RI, weight_eIO, per_expert)
    return result


class _GroupedLinear(Function):
    @staticmethod
    def forward(ctx: Any, rows_RI: Tensor, weight_eIO: Tensor, count_e: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RI, weight_eIO, count_e)
        return _rows_times_weight(rows_RI, weight_eIO, count_e)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_RI, weight_eIO, count_e = ctx.saved_tensors
        grad_RO = grads[0].contiguous()
        grad_rows = _rows_times_weight(grad_RO, weight_eIO.transpose(1, 2), count_e) if ctx.needs_input_grad[0] else None
        grad_weight = _outers(rows_RI, grad_RO, count_e) if ctx.needs_input_grad[1] else None
        return grad_rows, grad_weight, None


def _rows_times_weight(rows_RI: Tensor, weight_eIO: Tensor, count_e: Tensor) -> Tensor:
    if rows_RI.is_cuda:
        return grouped_mm(rows_RI, weight_eIO, offs=count_e.cumsum(0).to(torch.int32))
    out_RO = rows_RI.new_empty(len(rows_RI), weight_eIO.shape[2])
    for rows, weight, out in zip(*_split(count_e, rows_RI), weight_eIO, *_split(count_e, out_RO), strict=True):
        torch.mm(rows, weight, out=out)
    return out_RO


def _outers(rows_RI: Tensor, grad_RO: Tensor, count_e: Tensor) -> Tensor:
    """[e, I, O]: the weights' gradient, `rows^T @ grad` of each expert."""
    if rows_RI.is_cuda:
        return grouped_mm(rows_RI.t(), grad_RO, offs=count_e.cumsum(0).to(torch.int32))
    out_eIO = rows_RI.new_empty(len(count_e), rows_RI.shape[1], grad_RO.shape[1])
    for rows, grad, out in zip(*_split(count_e, rows_RI, grad_RO), out_eIO, strict=True):
        outer(rows, grad, out)
    return out_eIO


def outer(rows_RI: Tensor, grad_RO: Tensor, out_IO: Tensor) -> None:
    """`out = rows^T @ grad` of one expert.

    In bf16 oneDNN takes up to twice as long for a transposed left side as for a copy of it and a plain product, because the rows of
    an expert are no round number; MKL in float32 does not care.
    """
    left_IR = rows_RI.t() if rows_RI.element_size() >= 4 else rows_RI.t().contiguous()
    torch.mm(left_IR, grad_RO, out=out_IO)


def _split(count_e: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    sizes = count_e.tolist()
    return [tensor.split(sizes) for tensor in tensors]


def grouped_linear_reference(rows_RI: Tensor, weight_eIO: Tensor, count_e: Tensor) -> Tensor:
    """One row at a time. For tests."""
    expert_R = torch.arange(len(count_e)).repeat_interleave(count_e)
    rows = [row @ weight_eIO[e] for row, e in zip(rows_RI, expert_R.tolist(), strict=True)]
    return torch.stack(rows) if rows else rows_RI.new_zeros(0, weight_eIO.shape[2])
