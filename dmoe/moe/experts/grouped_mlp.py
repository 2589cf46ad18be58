"""Feed-forward experts, stacked on the expert dimension.

`feed_forward` computes all experts of rows that are grouped by expert: one at a time on the CPU
(`one_by_one.py`), all in one kernel on CUDA.

Letters: R rows, D input width, M output width, F hidden width, H = 2F for gated kinds, else F; I
and O: input and output width of one product; E experts, e local experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import grouped_mm

from dmoe.config.expert_shapes import matrix_shapes
from dmoe.moe.experts.activation import ACTIVATION_FNS, activated_product
from dmoe.moe.experts.base import Experts
from dmoe.moe.experts.copies import Weights, compute_experts
from dmoe.moe.experts.one_by_one import (
    TokenRows,
    rows_through_experts,
    tokens_through_experts,
    weight_grad,
)
from dmoe.moe.interfaces import RowCounts, TokensPerExpert
from dmoe.moe.placement import ExpertPlacement, contiguous_placement
from dmoe.moe.rng import normal_

ROW_ALIGNMENT = 16
"""Bytes; each row of a matrix in `grouped_mm` starts at a multiple of it."""


class MLPExperts(Experts):
    """Uniform experts: expert e computes `activation(x @ w_in[e]) @ w_out[e]`.

    Gated kinds split the hidden rows in two. No biases: zero stays zero, so an empty slot
    contributes nothing, forward or backward.

    Parameters: `w_in` [e, D, H] and `w_out` [e, F, M]; of all E experts until `shard` keeps a
    contiguous run. They are cast to the rows' dtype (bf16 rows under autocast, float32 master
    weights).
    """

    takes_copies = True
    takes_tokens = True

    def __init__(
        self, kind: str, dim: int, expert_dim: int, num_experts: int, out_dim: int
    ) -> None:
        shapes = matrix_shapes([expert_dim], dim, out_dim, kind)
        super().__init__(kind, (shapes,) * num_experts)
        self.first = 0  # global id of the first local expert
        self.recompute_activation = False  # `train.recompute=activation`
        self.w_in = nn.Parameter(torch.empty(num_experts, *shapes[0]))
        self.w_out = nn.Parameter(torch.empty(num_experts, *shapes[1]))

    def forward(
        self, rows_RD: Tensor, tokens_per_expert: RowCounts, tokens: TokenRows | None = None
    ) -> Tensor:
        """Compute rows_RM; with `tokens`, the sum over each token's experts from tokens x_TD."""
        if tokens is not None:
            assert isinstance(tokens_per_expert, Tensor), "packed, all experts local"
            return tokens_through_experts(
                self.kind, rows_RD, self.w_in, self.w_out, tokens_per_expert.tolist(), *tokens
            )
        weights = {name: getattr(self, name).to(rows_RD.dtype) for name in ("w_in", "w_out")}
        return compute_experts(self._rows, weights, rows_RD, tokens_per_expert)

    def _rows(
        self, weights: Weights, rows_RD: Tensor, tokens_per_expert: TokensPerExpert
    ) -> Tensor:
        return feed_forward(
            self.kind,
            rows_RD,
            weights["w_in"],
            weights["w_out"],
            tokens_per_expert,
            self.recompute_activation,
        )

    def placement(self, ranks: int) -> ExpertPlacement:
        return contiguous_placement(self.num_experts, ranks)

    def shard(self, placement: ExpertPlacement, rank: int) -> None:
        owned = placement.experts[rank]
        self.slice_experts(owned[0], len(owned))

    def slice_experts(self, first: int, count: int) -> None:
        """Keep only the global experts `first .. first+count-1`."""
        self.first = first
        for name in ("w_in", "w_out"):
            whole = getattr(self, name)
            kept = whole.detach()[first : first + count].clone()
            setattr(self, name, nn.Parameter(kept, requires_grad=whole.requires_grad))

    def initialize(self, seed: int, layer: int, std: float, out_std: float) -> None:
        """Draw each expert from a generator keyed by its global id: the same at any EP size."""
        for local in range(len(self.w_in)):
            expert = self.first + local
            normal_(self.w_in[local], std, seed, "expert", layer, expert, "in")
            normal_(self.w_out[local], out_std, seed, "expert", layer, expert, "out")


def feed_forward(
    kind: str,
    rows_RD: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    tokens_per_expert: TokensPerExpert,
    recompute_activation: bool = False,
) -> Tensor:
    """Compute `activation(rows @ w_in[e]) @ w_out[e]`, [R, D] -> [R, M].

    On the CPU expert by expert; on CUDA in three steps over all rows, where one large kernel
    beats e small ones. Keeps the rows and the hidden rows for backward. Host syncs: none (on the
    CPU, `tokens_per_expert` is in host memory).

    Args:
        kind: activation, a key of `ACTIVATIONS`.
        rows_RD: rows grouped by expert.
        w_in: [e, D, H], in the rows' dtype.
        w_out: [e, F, M], in the rows' dtype.
        tokens_per_expert: rows of each local expert; of unused rows, the result is zero.
        recompute_activation: compute the activated rows again in backward; always so on the CPU.
    """
    if rows_RD.is_cuda:
        weights = (w_in, w_out, tokens_per_expert, recompute_activation)
        return feed_forward_in_steps(kind, rows_RD, *weights)
    sizes = (
        [tokens_per_expert] * len(w_in)
        if isinstance(tokens_per_expert, int)
        else tokens_per_expert.tolist()
    )
    return rows_through_experts(kind, rows_RD, w_in, w_out, sizes)


def feed_forward_in_steps(
    kind: str,
    rows_RD: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    tokens_per_expert: TokensPerExpert,
    recompute_activation: bool = False,
) -> Tensor:
    """Compute `feed_forward` in three steps: the CUDA path, and the tests' reference."""
    hidden_RH = grouped_linear(rows_RD, w_in, tokens_per_expert)
    if not recompute_activation:
        return grouped_linear(ACTIVATION_FNS[kind](hidden_RH), w_out, tokens_per_expert)
    more = (tokens_per_expert, grouped_linear, _any_weight_grads)
    return activated_product(kind, hidden_RH, w_out, *more)


def _any_weight_grads(
    rows_RI: Tensor, grad_RO: Tensor, weight_eIO: Tensor, count: TokensPerExpert
) -> Tensor:
    """Compute the weights' gradient for all that `grouped_linear` takes, [e, I, O]."""
    grad_RO = _contiguous(grad_RO)
    if isinstance(count, int):
        groups = (len(weight_eIO), count, -1)
        return torch.bmm(rows_RI.view(groups).mT, grad_RO.view(groups))
    multiple = ROW_ALIGNMENT // rows_RI.element_size() if rows_RI.is_cuda else 1
    rows, grad = (F.pad(t, (0, -t.shape[1] % multiple)) for t in (rows_RI, grad_RO))
    return _weight_grads(rows, grad, count[: len(weight_eIO)])[
        :, : rows_RI.shape[1], : grad_RO.shape[1]
    ]


def grouped_linear(
    rows_RI: Tensor, weight_eIO: Tensor, tokens_per_expert: TokensPerExpert
) -> Tensor:
    """Compute `rows @ weight[e]` for rows grouped by expert, [R, O].

    An expert without rows gets a zero gradient. Equal groups (an int) are one batched GEMM. Unequal
    ones are `torch.nn.functional.grouped_mm` on CUDA, which reads the group ends on the device; on
    the CPU a loop of GEMMs that write into the result, measured at 0.6 times the time of
    `grouped_mm` there (`dmoe bench layer`). In float64, and with more groups than `grouped_mm`
    takes, CUDA computes the loop too, with one host read. Unused rows give zero.

    `grouped_mm` takes matrices whose rows start at multiples of 16 bytes. Other widths are padded
    with zeros, which change no number; the cost is a copy of what is padded.
    """
    if isinstance(tokens_per_expert, int):
        experts, width, out = weight_eIO.shape
        return torch.bmm(rows_RI.view(experts, tokens_per_expert, width), weight_eIO).view(
            experts * tokens_per_expert, out
        )
    multiple = ROW_ALIGNMENT // rows_RI.element_size() if rows_RI.is_cuda else 1
    more_in, more_out = (-size % multiple for size in weight_eIO.shape[1:])
    if not more_in and not more_out:
        result: Tensor = _GroupedLinear.apply(rows_RI, weight_eIO, tokens_per_expert)
        return result
    padded_RO: Tensor = _GroupedLinear.apply(
        F.pad(rows_RI, (0, more_in)),
        F.pad(weight_eIO, (0, more_out, 0, more_in)),
        tokens_per_expert,
    )
    return padded_RO[:, : weight_eIO.shape[2]]


class _GroupedLinear(Function):
    @staticmethod
    def forward(ctx: Any, rows_RI: Tensor, weight_eIO: Tensor, count_e: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RI, weight_eIO, count_e)
        return _rows_times_weight(rows_RI, weight_eIO, count_e)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_RI, weight_eIO, count_e = ctx.saved_tensors
        grad_RO = _contiguous(grads[0])
        grad_rows = (
            _rows_times_weight(grad_RO, weight_eIO.transpose(1, 2), count_e)
            if ctx.needs_input_grad[0]
            else None
        )
        count_e, grad_weight = count_e[: len(weight_eIO)], None
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_grads(rows_RI, grad_RO, count_e)
        return grad_rows, grad_weight, None


def _contiguous(tensor: Tensor) -> Tensor:
    """Return the tensor with the strides of a new one.

    Without elements `contiguous()` keeps any strides, such as the (0, 0) of an expanded gradient,
    which `grouped_mm` refuses.
    """
    if tensor.numel():
        return tensor.contiguous()
    return tensor.clone(memory_format=torch.contiguous_format)


def _uses_grouped_mm(rows_RI: Tensor, count_e: Tensor) -> bool:
    """Return whether `grouped_mm` computes this product: not in float64, at most 1,023 groups."""
    return rows_RI.is_cuda and rows_RI.dtype != torch.float64 and len(count_e) < 1024


def _rows_times_weight(rows_RI: Tensor, weight_eIO: Tensor, count_e: Tensor) -> Tensor:
    if _uses_grouped_mm(rows_RI, count_e):
        end_e = count_e[: len(weight_eIO)].cumsum(0, dtype=torch.int32)
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


def _weight_grads(rows_RI: Tensor, grad_RO: Tensor, count_e: Tensor) -> Tensor:
    """Compute the weights' gradient, `rows^T @ grad` of each expert, [e, I, O]."""
    if _uses_grouped_mm(rows_RI, count_e):
        grad_eIO = grouped_mm(rows_RI.t(), grad_RO, offs=count_e.cumsum(0, dtype=torch.int32))
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
