"""The product that gives a router its logits.

Letters: T tokens, D width, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from dmoe.moe.routing import masked, without_autocast


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
    """`x W^T` of a router; rows with zero gradient are left out of W's gradient.

    A dropped token has zero gradient and may hold a NaN, and 0 x NaN is NaN.
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
                grad_w = grad_TE.t() @ masked(x_TD, (grad_TE != 0).any(1))
        return grad_x, grad_w
