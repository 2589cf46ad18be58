"""The product that gives a router its logits, and weights of a renormalized softmax.

The weights, with the gradient of both divisions in one step:

    w_k = s_k / (sum over the selected of s + 1e-20),   s = softmax(l)

The softmax's own denominator cancels, so w is the softmax of the selected logits, and

    dL/dl_k = w_k * (g_k - sum over the selected of g w),   g = dL/dw

and 0 for the other experts. Exact to rounding where the selected scores sum to far more than 1e-20.
Where a bias selects experts of no score, what is left out is -s_i * (sum of g w) * (1 - sum of w)
for every expert i: up to a quarter of the largest g where that sum is 1e-20, and 0 far below it.

Letters: T tokens, D width, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from dmoe.moe.dispatch import without_autocast


def router_dtype(x: Tensor) -> torch.dtype:
    """Return float32, but float64 for float64 inputs (so that `verify` can compare at 1e-10)."""
    return torch.promote_types(x.dtype, torch.float32)


def project(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Compute x W^T in `router_dtype`, regardless of autocast."""
    dtype = router_dtype(x_TD)
    with without_autocast(x_TD):
        if not torch.is_grad_enabled():
            return x_TD.to(dtype) @ weight_ED.to(dtype).t()
        product_TE: Tensor = RowProduct.apply(x_TD.to(dtype), weight_ED.to(dtype))
        return product_TE


class RowProduct(Function):
    """`x W^T` of a router; what is not finite in x is left out of W's gradient.

    A dropped token has zero gradient and may hold a NaN, and 0 x NaN is NaN. Of a token that is
    kept, the scores are NaN then, and so is its gradient, whatever x is replaced by.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return x_TD @ weight_ED.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x_TD, weight_ED), (grad_TE,) = ctx.saved_tensors, grads
        grad_x = grad_w = None
        with without_autocast(grad_TE):
            if ctx.needs_input_grad[0]:
                grad_x = grad_TE @ weight_ED
            if ctx.needs_input_grad[1]:
                grad_w = grad_TE.t() @ x_TD.nan_to_num(0.0, 0.0, 0.0)
        return grad_x, grad_w


def renormalized_softmax(
    logit_TE: Tensor, score_TE: Tensor, expert_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the weights of the selected experts, from scores that are the logits' softmax.

    Args:
        logit_TE: float32 or float64.
        score_TE: their softmax.
        expert_TK: int64.

    Returns:
        The weights [T, K]; and the logits again, for losses on them: the gradient of the weights is
        added to that of these, so that the two are not summed in a step of their own.
    """
    weight_TK, same_TE = _RenormalizedSoftmax.apply(logit_TE, score_TE.detach(), expert_TK)
    return weight_TK, same_TE


class _RenormalizedSoftmax(Function):
    @staticmethod
    def forward(
        ctx: Any, logit_TE: Tensor, score_TE: Tensor, expert_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        score_TK = score_TE.gather(1, expert_TK)
        weight_TK = score_TK / (score_TK.sum(-1, keepdim=True) + 1e-20)
        ctx.save_for_backward(weight_TK, expert_TK)
        ctx.shape = logit_TE.shape
        return weight_TK, logit_TE.view_as(logit_TE)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        (weight_TK, expert_TK), (grad_TK, grad_TE) = ctx.saved_tensors, grads
        if grad_TK is None:
            return grad_TE, None, None
        grad_TK = torch.ops.aten._softmax_backward_data(grad_TK, weight_TK, -1, weight_TK.dtype)
        if grad_TE is not None:
            return grad_TE.scatter_add(1, expert_TK, grad_TK), None, None
        return grad_TK.new_zeros(ctx.shape).scatter_add_(1, expert_TK, grad_TK), None, None
