"""The elementwise middle of an expert.

A gated unit is memory traffic, not arithmetic: written plainly it makes two temporaries forward and five backward, which on a CPU
cost as much as a third of the GEMMs. The functions here keep only their input and work in place.

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
"""Each kind's curve, and its derivative times a gradient, written into `grad_input`."""


def activate(kind: str, hidden_RH: Tensor) -> Tensor:
    """[R, F], without autograd: `curve(gate) * up` of [gate | up] for gated kinds (Shazeer 2020), else `curve(hidden)`."""
    curve, _ = ACTIVATIONS[kind]
    if kind not in GATED:
        return curve(hidden_RH)
    gate, up = hidden_RH.chunk(2, -1)
    return curve(gate).mul_(up)


def activate_backward(kind: str, hidden_RH: Tensor, grad_RF: Tensor) -> tuple[Tensor, Tensor]:
    """`activate` once more and the gradient of its input: computing both here is cheaper than keeping the first."""
    curve, derivative = ACTIVATIONS[kind]
    grad_RH = torch.empty_like(hidden_RH)
    if kind not in GATED:
        derivative(grad_RF, hidden_RH, grad_input=grad_RH)
        return curve(hidden_RH), grad_RH
    gate, up = hidden_RH.chunk(2, -1)
    grad_gate, grad_up = grad_RH.chunk(2, -1)
    bent = curve(gate)
    torch.mul(grad_RF, bent, out=grad_up)
    derivative(grad_RF * up, gate, grad_input=grad_gate)
    return bent.mul_(up), grad_RH


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
    """`activate` with autograd, for any [..., H]."""
    out: Tensor = _Activate.apply(hidden_RH, kind)
    return out


def swiglu(hidden_R2F: Tensor) -> Tensor:
    """`silu(gate) * up` of [gate | up] (Shazeer 2020, "GLU variants improve transformer"). [R, 2F] -> [R, F]."""
    return differentiable("swiglu", hidden_R2F)


def swiglu_reference(hidden_R2F: Tensor) -> Tensor:
    gate, up = hidden_R2F.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


ACTIVATION_FNS: dict[str, Callable[[Tensor], Tensor]] = {
    kind: partial(differentiable, kind) for kind in ACTIVATIONS
}
