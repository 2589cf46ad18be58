"""The feed-forward of all experts as one autograd function, an expert at a time.

Between the two products of an expert its hidden rows are still in the cache, and no temporary is larger than one expert's rows:
glibc returns every block above 32 MiB to the system, so each larger one is paid for again, page by page, in every forward.

Letters: R rows, D width in, M width out, F hidden width, H = 2F for gated kinds, else F; e experts here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from dmoe.moe.dispatch import TokensPerExpert
from dmoe.moe.experts.activation import ACTIVATION_FNS, activate, activate_backward
from dmoe.moe.experts.grouped import grouped_linear, outer

__all__ = ["feed_forward", "feed_forward_in_steps"]


def feed_forward(kind: str, rows_RD: Tensor, w_in: Tensor, w_out: Tensor, per_expert: TokensPerExpert) -> Tensor:
    """`activation(rows @ w_in[e]) @ w_out[e]`, [R, D] -> [R, M], rows grouped by expert.

    On the CPU expert by expert; elsewhere in three steps over all rows, where one large kernel beats e small ones. Keeps the rows
    and the hidden rows for backward. On the CPU one host read of `per_expert`, which is there already.
    """
    if rows_RD.device.type != "cpu":
        return feed_forward_in_steps(kind, rows_RD, w_in, w_out, per_expert)
    sizes = [per_expert] * len(w_in) if isinstance(per_expert, int) else per_expert.tolist()
    out: Tensor = _FeedForward.apply(rows_RD, w_in, w_out, sizes, kind)
    return out


def feed_forward_in_steps(kind: str, rows_RD: Tensor, w_in: Tensor, w_out: Tensor, per_expert: TokensPerExpert) -> Tensor:
    """The same, one operation after the other. What CUDA runs, and what the fused one is tested against."""
    return grouped_linear(ACTIVATION_FNS[kind](grouped_linear(rows_RD, w_in, per_expert)), w_out, per_expert)


class _FeedForward(Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, w_in: Tensor, w_out: Tensor, sizes: list[int], kind: str) -> Tensor:
        out_RM = rows_RD.new_empty(len(rows_RD), w_out.shape[2])
        hidden = []
        for x, up, down, y in zip(rows_RD.split(sizes), w_in, w_out, out_RM.split(sizes), strict=True):
            hidden.append(x @ up)
            torch.mm(activate(kind, hidden[-1]), down, out=y)
        ctx.sizes, ctx.kind = sizes, kind
        ctx.save_for_backward(rows_RD, w_in, w_out, *hidden)
        return out_RM

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        rows_RD, w_in, w_out, *hidden = ctx.saved_tensors
        grad_rows, grad_in, grad_out = (
            torch.empty_like(x) if needed else None
            for x, needed in zip((rows_RD, w_in, w_out), ctx.needs_input_grad[:3], strict=True)
        )
        start = 0
        for e, (h, size) in enumerate(zip(hidden, ctx.sizes, strict=True)):
            here = slice(start, start := start + size)
            grad = grads[0][here]
            bent, grad_h = activate_backward(ctx.kind, h, grad @ w_out[e].t())
            if grad_out is not None:
                outer(bent, grad, grad_out[e])
            if grad_in is not None:
                outer(rows_RD[here], grad_h, grad_in[e])
            if grad_rows is not None:
                torch.mm(grad_h, w_in[e].t(), out=grad_rows[here])
        return grad_rows, grad_in, grad_out, None, None
