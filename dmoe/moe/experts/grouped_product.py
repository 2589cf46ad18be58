"""Products of rows that are grouped by expert: one kernel on CUDA, a loop of products elsewhere.

Letters: R rows, I and O: input and output width, e local experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import grouped_mm

from dmoe.moe.experts.one_by_one import weight_grad
from dmoe.moe.inputs import first_derivative_only
from dmoe.moe.interfaces import TokensPerExpert

ROW_ALIGNMENT = 16
"""Bytes; each row of a matrix in `grouped_mm` starts at a multiple of it."""


class Groups(NamedTuple):
    """Rows per expert, and where they end: computed once for all products of the rows."""

    count_e: Tensor
    """As `TokensPerExpert`."""
    end_e: Tensor | None
    """int32 [e], for `grouped_mm`. None: it does not compute these products."""


def groups_of(rows_RI: Tensor, weight_eIO: Tensor, count: Counts) -> Groups | int:
    """Return the groups of `count`, which may be groups already."""
    if not isinstance(count, Tensor):
        return count
    # not in float64, at most 1,023 groups
    is_grouped = rows_RI.is_cuda and rows_RI.dtype != torch.float64 and len(count) < 1024
    ends = count[: len(weight_eIO)].cumsum(0, dtype=torch.int32) if is_grouped else None
    return Groups(count, ends)


Counts = TokensPerExpert | Groups


def grouped_linear(rows_RI: Tensor, weight_eIO: Tensor, tokens_per_expert: Counts) -> Tensor:
    """Compute `rows @ weight[e]` for rows grouped by expert, [R, O].

    An expert without rows gets a zero gradient. Equal groups (an int) are one batched GEMM. Unequal
    ones are `torch.nn.functional.grouped_mm` on CUDA, which reads the group ends on the device; on
    the CPU a loop of GEMMs that write into the result, measured at 0.6 times the time of
    `grouped_mm` there (`dmoe bench layer`). In float64, and with more groups than `grouped_mm`
    takes, CUDA computes the loop too, with one host read. Unused rows give zero.

    `grouped_mm` takes matrices whose rows start at multiples of 16 bytes. Other widths are padded
    with zeros, which change no number; the cost is a copy of what is padded.
    """
    groups = groups_of(rows_RI, weight_eIO, tokens_per_expert)
    if isinstance(groups, int):
        experts, width, out = weight_eIO.shape
        return torch.bmm(rows_RI.view(experts, groups, width), weight_eIO).view(
            experts * groups, out
        )
    multiple = ROW_ALIGNMENT // rows_RI.element_size() if rows_RI.is_cuda else 1
    more_in, more_out = (-size % multiple for size in weight_eIO.shape[1:])
    if not more_in and not more_out:
        result: Tensor = _GroupedLinear.apply(rows_RI, weight_eIO, groups)
        return result
    padded_RO: Tensor = _GroupedLinear.apply(
        F.pad(rows_RI, (0, more_in)),
        F.pad(weight_eIO, (0, more_out, 0, more_in)),
        groups,
    )
    return padded_RO[:, : weight_eIO.shape[2]]


class _GroupedLinear(Function):
    @staticmethod
    def forward(ctx: Any, rows_RI: Tensor, weight_eIO: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(rows_RI, weight_eIO)
        ctx.groups = groups
        return _rows_times_weight(rows_RI, weight_eIO, groups)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_RI, weight_eIO = ctx.saved_tensors
        grad_RO, grad_rows, grad_weight = _contiguous(grads[0]), None, None
        if ctx.needs_input_grad[0]:
            grad_rows = _rows_times_weight(grad_RO, weight_eIO.transpose(1, 2), ctx.groups)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_grads(rows_RI, grad_RO, len(weight_eIO), ctx.groups)
        return grad_rows, grad_weight, None


def _contiguous(tensor: Tensor) -> Tensor:
    """Return the tensor with the strides of a new one.

    Without elements `contiguous()` keeps any strides, such as the (0, 0) of an expanded gradient,
    which `grouped_mm` refuses.
    """
    if tensor.numel():
        return tensor.contiguous()
    return tensor.clone(memory_format=torch.contiguous_format)


def _rows_times_weight(rows_RI: Tensor, weight_eIO: Tensor, groups: Groups) -> Tensor:
    count_e, end_e = groups
    if end_e is not None:
        out_RO = grouped_mm(rows_RI, weight_eIO, offs=end_e)
        if len(count_e) == len(weight_eIO):
            return out_RO
        row_R1 = torch.arange(len(out_RO), device=out_RO.device).unsqueeze(1)
        return out_RO.masked_fill_(row_R1 >= end_e[-1], 0.0)  # the kernel leaves them unset
    out_RO = rows_RI.new_empty(len(rows_RI), weight_eIO.shape[2])
    sizes = count_e.tolist()
    parts = zip(rows_RI.split(sizes), weight_eIO, out_RO.split(sizes), strict=False)
    for rows, weight, out in parts:
        torch.mm(rows, weight, out=out)
    _zero_unused(out_RO, sizes, weight_eIO)
    return out_RO


def _weight_grads(rows_RI: Tensor, grad_RO: Tensor, experts: int, groups: Groups) -> Tensor:
    """Compute the weights' gradient, `rows^T @ grad` of each expert, [e, I, O]."""
    count_e = groups.count_e[:experts]
    if groups.end_e is not None:
        grad_eIO = grouped_mm(rows_RI.t(), grad_RO, offs=groups.end_e)
        if torch.cuda.get_device_capability(rows_RI.device)[0] >= 10:
            # Blackwell's kernel leaves the gradient of an expert without rows unset
            # (pytorch/pytorch#172439, cutlass#2674). A product would keep its NaN.
            grad_eIO.masked_fill_((count_e == 0)[:, None, None], 0.0)
        return grad_eIO
    out_eIO = rows_RI.new_empty(len(count_e), rows_RI.shape[1], grad_RO.shape[1])
    sizes = count_e.tolist()
    rows_RI, grad_RO = rows_RI[: sum(sizes)], grad_RO[: sum(sizes)]
    for rows, grad, out in zip(rows_RI.split(sizes), grad_RO.split(sizes), out_eIO, strict=True):
        weight_grad(rows, grad, out)
    return out_eIO


def _zero_unused(rows: Tensor, sizes: list[int], experts: Tensor) -> None:
    """Set the unused rows after those of the last expert to zero, if there are any."""
    if len(sizes) > len(experts):
        rows[len(rows) - sizes[-1] :] = 0.0


def any_weight_grads(rows_RI: Tensor, grad_RO: Tensor, weight_eIO: Tensor, count: Counts) -> Tensor:
    """Compute the weights' gradient for all that `grouped_linear` takes, [e, I, O]."""
    grad_RO = _contiguous(grad_RO)
    groups = groups_of(rows_RI, weight_eIO, count)
    if isinstance(groups, int):
        experts, width, out = weight_eIO.shape
        rows_eRI, grad_eRO = (
            rows_RI.view(experts, groups, width),
            grad_RO.view(experts, groups, out),
        )
        return torch.bmm(rows_eRI.mT, grad_eRO)
    multiple = ROW_ALIGNMENT // rows_RI.element_size() if rows_RI.is_cuda else 1
    rows, grad = (F.pad(t, (0, -t.shape[1] % multiple)) for t in (rows_RI, grad_RO))
    return _weight_grads(rows, grad, len(weight_eIO), groups)[
        :, : rows_RI.shape[1], : grad_RO.shape[1]
    ]
