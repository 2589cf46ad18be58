"""The elementwise middle of an expert.

A gated unit is memory traffic, not arithmetic: written plainly it makes two temporaries forward and five backward, which on a CPU
cost as much as a third of the GEMMs. The functions here keep only their input and work in place.

Letters: R rows, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

__all__ = ["ACTIVATIONS", "GATED", "swiglu", "swiglu_reference"]


def swiglu(hidden_R2F: Tensor) -> Tensor:
    """`silu(gate) * up` of [gate | up] (Shazeer 2020, "GLU variants improve transformer"). [R, 2F] -> [R, F]."""
    out: Tensor = _SwiGLU.apply(hidden_R2F)
    return out


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, hidden_R2F: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_R2F)
        gate, up = hidden_R2F.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (hidden_R2F,) = ctx.saved_tensors
        gate, up = hidden_R2F.chunk(2, -1)
        grad_R2F = torch.empty_like(hidden_R2F)
        grad_gate, grad_up = grad_R2F.chunk(2, -1)
        torch.mul(grads[0], F.silu(gate), out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grads[0] * up, gate))
        return grad_R2F


def swiglu_reference(hidden_R2F: Tensor) -> Tensor:
    gate, up = hidden_R2F.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


def geglu(hidden_R2F: Tensor) -> Tensor:
    gate, up = hidden_R2F.chunk(2, -1)
    return F.gelu(gate) * up


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": swiglu, "geglu": geglu, "gelu": F.gelu, "relu": F.relu}
GATED = frozenset({"swiglu", "geglu"})
