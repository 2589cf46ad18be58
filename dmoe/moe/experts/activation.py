"""The activations of experts, forward and backward.

A gated activation is memory traffic, not arithmetic: written plainly it makes two temporaries in
forward and five in backward, which on a CPU cost as much as a third of the GEMMs. The activations
here keep only their input and work in place.

Letters: R rows, F hidden width, H = 2F for gated kinds, else F.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from dmoe.config.expert_shapes import GATED
from dmoe.moe import kernels
from dmoe.moe.inputs import first_derivative_only

aten = torch.ops.aten
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[..., Tensor]]] = {
    "swiglu": (F.silu, aten.silu_backward.grad_input),
    "geglu": (F.gelu, aten.gelu_backward.grad_input),
    "gelu": (F.gelu, aten.gelu_backward.grad_input),
    "relu": (
        F.relu,
        lambda grad, x, *, grad_input: aten.threshold_backward.grad_input(
            grad, x, 0, grad_input=grad_input
        ),
    ),
}
"""The nonlinearity of each kind, and its derivative times a gradient, written to `grad_input`."""


def activate(kind: str, hidden_RH: Tensor, by: str = "torch") -> Tensor:
    """Compute the activation without autograd, [R, F].

    `f(gate) * up` of [gate | up] for gated kinds (Shazeer 2020), else `f(hidden)`. `by`:
    `moe.kernels`.
    """
    if by == "triton":
        return kernels.activate(kind, hidden_RH)
    nonlinearity, _ = ACTIVATIONS[kind]
    if kind not in GATED:
        return nonlinearity(hidden_RH)
    gate, up = hidden_RH.chunk(2, -1)
    return nonlinearity(gate).mul_(up)


def activate_backward(
    kind: str,
    hidden_RH: Tensor,
    grad_RF: Tensor,
    weight_R: Tensor | None = None,
    by: str = "torch",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Recompute `activate` and compute the gradient of its input.

    Computing both here is cheaper than keeping the first from forward.

    Args:
        kind: a key of `ACTIVATIONS`.
        hidden_RH: input of `activate`.
        grad_RF: gradient of `activate(hidden) * weight`; overwritten if there are weights.
        weight_R: factor of each row. None: 1.
        by: `moe.kernels`; triton knows no weights.

    Returns:
        `activate(hidden) * weight`, [R, F]; the gradients of `hidden`, [R, H], and of `weight`.
    """
    if by == "triton":
        assert weight_R is None
        return (*kernels.activate_backward(kind, hidden_RH, grad_RF), None)
    nonlinearity, derivative = ACTIVATIONS[kind]
    grad_RH = torch.empty_like(hidden_RH)
    if kind not in GATED:
        activated_RF, dot_R = nonlinearity(hidden_RH), None
        if weight_R is not None:
            dot_R = _row_dots(grad_RF, activated_RF)
            activated_RF = activated_RF * weight_R.unsqueeze(1)
            grad_RF.mul_(weight_R.unsqueeze(1))
        derivative(grad_RF, hidden_RH, grad_input=grad_RH)
        return activated_RF, grad_RH, dot_R
    gate, up = hidden_RH.chunk(2, -1)
    grad_gate, grad_up = grad_RH.chunk(2, -1)
    curved_RF, dot_R = nonlinearity(gate), None
    if weight_R is None:
        torch.mul(grad_RF, curved_RF, out=grad_up)
        derivative(grad_RF * up, gate, grad_input=grad_gate)
        return curved_RF.mul_(up), grad_RH, None
    activated_RF = curved_RF * up
    dot_R = _row_dots(grad_RF, activated_RF)
    grad_RF.mul_(weight_R.unsqueeze(1))
    torch.mul(grad_RF, curved_RF, out=grad_up)
    derivative(grad_RF.mul_(up), gate, grad_input=grad_gate)
    return activated_RF.mul_(weight_R.unsqueeze(1)), grad_RH, dot_R


def _row_dots(one_RF: Tensor, two_RF: Tensor) -> Tensor:
    """Compute the dot product of each pair of rows, [R], accumulated in float32, on the CPU.

    The kernel behind `embedding_bag`'s backward: `vecdot` rounds each product to bf16 first.
    """
    row_R = torch.arange(len(one_RF))
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(  # type: ignore[no-any-return]
        one_RF, two_RF, row_R, row_R, row_R, 0
    )


class _Activate(Function):
    @staticmethod
    def forward(ctx: Any, hidden_RH: Tensor, kind: str, by: str) -> Tensor:
        ctx.kind, ctx.by = kind, by
        ctx.save_for_backward(hidden_RH)
        return activate(kind, hidden_RH, by)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (hidden_RH,) = ctx.saved_tensors
        return activate_backward(ctx.kind, hidden_RH, grads[0], by=ctx.by)[1], None, None


def differentiable(kind: str, hidden_RH: Tensor, by: str = "torch") -> Tensor:
    """Compute `activate` with autograd, for any [..., H]; with Triton for [R, H]."""
    out: Tensor = _Activate.apply(hidden_RH, kind, by)
    return out


class _ActivatedProduct(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_RH: Tensor, weight: Tensor, kind: str, count: Any, by: str, *rules: Any
    ) -> Tensor:
        ctx.kind, ctx.count, ctx.by, ctx.rules = kind, count, by, rules
        ctx.save_for_backward(hidden_RH, weight)
        return rules[0](activate(kind, hidden_RH, by), weight, count)  # type: ignore[no-any-return]

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (hidden_RH, weight), (product, weight_grads) = ctx.saved_tensors, ctx.rules
        grad_RF = product(grads[0].contiguous(), weight.transpose(1, 2), ctx.count)
        activated_RF, grad_RH = activate_backward(ctx.kind, hidden_RH, grad_RF, by=ctx.by)[:2]
        grad = None
        if ctx.needs_input_grad[1]:
            grad = weight_grads(activated_RF, grads[0], weight, ctx.count)
        return grad_RH, grad, *[None] * 5


def activated_product(
    kind: str,
    hidden_RH: Tensor,
    weight: Tensor,
    count: Any,
    product: Any,
    weight_grads: Any,
    by: str = "torch",
) -> Tensor:
    """Compute `product(activate(hidden), weight, count)`; keep hidden for backward, no activated.

    F numbers per row less than the two steps keep, for one more activation. The same bits.

    Args:
        kind: activation.
        hidden_RH: hidden rows.
        weight: [e, F, M].
        count: rows of each expert.
        product: rows, weight, count -> rows.
        weight_grads: rows, gradient, weight, count -> gradient of the weight.
        by: `moe.kernels`.
    """
    rules = (product, weight_grads)
    out: Tensor = _ActivatedProduct.apply(hidden_RH, weight, kind, count, by, *rules)
    return out


class _TwoProducts(Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        kind: str,
        count: Any,
        by: str,
        *rules: Any,
    ) -> Tensor:
        ctx.kind, ctx.count, ctx.by, ctx.rules = kind, count, by, rules
        hidden_RH = rules[0](rows_RD, w_in, count)
        ctx.save_for_backward(rows_RD, w_in, w_out, hidden_RH)
        return rules[0](activate(kind, hidden_RH, by), w_out, count)  # type: ignore[no-any-return]

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, w_in, w_out, hidden_RH = ctx.saved_tensors
        product, weight_grads, send_gradient = ctx.rules
        grad_RF = product(grads[0].contiguous(), w_out.transpose(1, 2), ctx.count)
        activated_RF, grad_RH = activate_backward(ctx.kind, hidden_RH, grad_RF, by=ctx.by)[:2]
        grad_rows = grad_in = grad_out = None
        if ctx.needs_input_grad[0]:
            grad_rows = product(grad_RH, w_in.transpose(1, 2), ctx.count)
            send_gradient(grad_rows)
        if ctx.needs_input_grad[1]:
            grad_in = weight_grads(rows_RD, grad_RH, w_in, ctx.count)
        if ctx.needs_input_grad[2]:
            grad_out = weight_grads(activated_RF, grads[0], w_out, ctx.count)
        return grad_rows, grad_in, grad_out, *[None] * 6


def two_products(
    kind: str,
    rows_RD: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    count: Any,
    product: Any,
    weight_grads: Any,
    send_gradient: Callable[[Tensor], None],
    by: str = "torch",
) -> Tensor:
    """Compute `product(activate(product(rows, w_in)), w_out)`, weight gradients last in backward.

    Args:
        kind, count, product, weight_grads, by: see `activated_product`.
        rows_RD: rows.
        w_in: [e, D, H].
        w_out: [e, F, M].
        send_gradient: called with the rows' gradient before the weights' gradients are computed.
    """
    rules = (product, weight_grads, send_gradient)
    out: Tensor = _TwoProducts.apply(rows_RD, w_in, w_out, kind, count, by, *rules)
    return out


def swiglu(hidden_R2F: Tensor) -> Tensor:
    """Compute `silu(gate) * up` of [gate | up], [R, 2F] -> [R, F].

    Shazeer 2020, "GLU variants improve transformer".
    """
    return differentiable("swiglu", hidden_R2F)


ACTIVATION_FNS: dict[str, Callable[[Tensor], Tensor]] = {
    kind: partial(differentiable, kind) for kind in ACTIVATIONS
}
"""The differentiable activation of each kind."""
