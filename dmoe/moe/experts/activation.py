"""Elementwise functions: the activations of experts, and gated fusion.

A gated activation is memory traffic, not arithmetic: written plainly it makes two temporaries in
forward and five in backward, which on a CPU cost as much as a third of the GEMMs. The activations
here keep only their input and work in place.

Gated fusion (Arevalo et al. 2017, "Gated Multimodal Units"): a gate for each element, computed from
all streams together.

    two streams:   g = sigmoid([f_1 | f_2] G + c),                     y = g * f_1 + (1 - g) * f_2
    S streams:     g = softmax over s of ([f_1 | ... | f_S] G_s + c_s),   y = sum_s g_s * f_s

The last stream's logit is 0, which makes the softmax of two exactly the sigmoid. A missing stream
is left out of the softmax. G = 0 and c = 0 give the mean. Cost: 2 S (S-1) W^2 FLOPs per token and T
* S * W values of memory. No collective, no host sync.

Letters: R rows, F hidden width, H = 2F for gated kinds, else F; T tokens, S streams, W width of
each stream, X = (S-1) * W, A = S * W.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from dmoe.config.expert_shapes import GATED

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


def activate(kind: str, hidden_RH: Tensor) -> Tensor:
    """Compute the activation without autograd, [R, F].

    `f(gate) * up` of [gate | up] for gated kinds (Shazeer 2020), else `f(hidden)`.
    """
    nonlinearity, _ = ACTIVATIONS[kind]
    if kind not in GATED:
        return nonlinearity(hidden_RH)
    gate, up = hidden_RH.chunk(2, -1)
    return nonlinearity(gate).mul_(up)


def activate_backward(
    kind: str, hidden_RH: Tensor, grad_RF: Tensor, weight_R: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Recompute `activate` and compute the gradient of its input.

    Computing both here is cheaper than keeping the first from forward.

    Args:
        kind: a key of `ACTIVATIONS`.
        hidden_RH: input of `activate`.
        grad_RF: gradient of `activate(hidden) * weight`; overwritten if there are weights.
        weight_R: factor of each row. None: 1.

    Returns:
        `activate(hidden) * weight`, [R, F]; the gradients of `hidden`, [R, H], and of `weight`.
    """
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
    def forward(ctx: Any, hidden_RH: Tensor, kind: str) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(hidden_RH)
        return activate(kind, hidden_RH)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (hidden_RH,) = ctx.saved_tensors
        return activate_backward(ctx.kind, hidden_RH, grads[0])[1], None


def differentiable(kind: str, hidden_RH: Tensor) -> Tensor:
    """Compute `activate` with autograd, for any [..., H]."""
    out: Tensor = _Activate.apply(hidden_RH, kind)
    return out


class _ActivatedProduct(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_RH: Tensor, weight: Tensor, kind: str, count: Any, *rules: Any
    ) -> Tensor:
        ctx.kind, ctx.count, ctx.rules = kind, count, rules
        ctx.save_for_backward(hidden_RH, weight)
        return rules[0](activate(kind, hidden_RH), weight, count)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (hidden_RH, weight), (product, weight_grads) = ctx.saved_tensors, ctx.rules
        grad_RF = product(grads[0].contiguous(), weight.transpose(1, 2), ctx.count)
        activated_RF, grad_RH = activate_backward(ctx.kind, hidden_RH, grad_RF)[:2]
        grad = None
        if ctx.needs_input_grad[1]:
            grad = weight_grads(activated_RF, grads[0], weight, ctx.count)
        return grad_RH, grad, None, None, None, None


def activated_product(
    kind: str, hidden_RH: Tensor, weight: Tensor, count: Any, product: Any, weight_grads: Any
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
    """
    out: Tensor = _ActivatedProduct.apply(hidden_RH, weight, kind, count, product, weight_grads)
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


def gated_sum(
    stream_TSW: Tensor, present_TS: Tensor | None, gate_AX: Tensor, bias_X: Tensor
) -> Tensor:
    """Sum the streams, weighted elementwise by the gate; 0 for tokens without any stream.

    Args:
        stream_TSW: the streams; any values where missing.
        present_TS: bool, False where a stream is missing. None: all present.
        gate_AX: G.
        bias_X: c.

    Returns:
        [T, W], in the dtype of the streams.
    """
    if present_TS is not None:
        stream_TSW = stream_TSW.masked_fill(~present_TS.unsqueeze(-1), 0.0)
    logit_TX = stream_TSW.flatten(1) @ gate_AX.to(stream_TSW.dtype) + bias_X.to(stream_TSW.dtype)
    logit_TSW = torch.cat([logit_TX, torch.zeros_like(stream_TSW[:, 0])], 1).view(stream_TSW.shape)
    if present_TS is not None:
        missing_TS1 = ~present_TS.unsqueeze(-1)
        # padding has no stream at all, and a softmax over nothing is NaN
        none_T11 = missing_TS1.all(1, keepdim=True)
        logit_TSW = logit_TSW.masked_fill(missing_TS1 & ~none_T11, -math.inf)
    return (logit_TSW.softmax(1) * stream_TSW).sum(1)


def gated_sum_reference(
    streams: Sequence[Tensor | None], gate_AX: Tensor, bias_X: Tensor
) -> Tensor:
    """Compute `gated_sum` of one token from the formula, [W]; None marks a missing stream.

    The naive twin of adapters' gated fusion (`dmoe verify`) uses it.
    """
    width = bias_X.shape[0] // (len(streams) - 1)
    input_A = torch.cat([bias_X.new_zeros(width) if f is None else f for f in streams])
    logits = [*(input_A @ gate_AX + bias_X).view(-1, width), bias_X.new_zeros(width)]
    total_W, mass_W = bias_X.new_zeros(width), bias_X.new_zeros(width)
    for f, logit_W in zip(streams, logits, strict=True):
        if f is not None:
            total_W, mass_W = total_W + logit_W.exp() * f, mass_W + logit_W.exp()
    return total_W / mass_W if any(f is not None for f in streams) else total_W
