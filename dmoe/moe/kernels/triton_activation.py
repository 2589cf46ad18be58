"""Triton kernels of the experts' activations, forward and backward.

The torch form is `activate` and `activate_backward` of `experts/activation.py`, which launch two
and up to six kernels for gated kinds; these launch one each. They compute in float32 (float64 for
float64) and round once at the end.

Letters: R rows, F hidden width, H = 2F for gated kinds, else F.
"""

# Triton's language has no types
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmoe.config.expert_shapes import GATED
from dmoe.moe.kernels.triton_rows import accumulator, block_of

CURVES = {"swiglu": "silu", "geglu": "gelu", "gelu": "gelu", "relu": "relu"}
"""The nonlinearity of each kind of `ACTIVATIONS`."""


@triton.jit
def _curve(x, CURVE: tl.constexpr):
    """Return f(x) and its derivative."""
    if CURVE == "silu":
        gate = tl.sigmoid(x)
        value = x * gate
        slope = gate * (1.0 + x * (1.0 - gate))
    elif CURVE == "gelu":
        normal = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * normal
        slope = normal + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        value = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        slope = tl.where(x > 0.0, 1.0, 0.0)
    return value, slope


@triton.jit
def _activate(
    hidden,
    out,
    width,
    CURVE: tl.constexpr,
    IS_GATED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    start = hidden + row * width * (2 if IS_GATED else 1)
    value, _ = _curve(tl.load(start + column, mask=inside, other=0.0).to(ACCUMULATE), CURVE)
    if IS_GATED:
        value *= tl.load(start + width + column, mask=inside, other=0.0).to(ACCUMULATE)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _activate_backward(
    hidden,
    grad,
    activated,
    grad_hidden,
    width,
    CURVE: tl.constexpr,
    IS_GATED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = row * width * (2 if IS_GATED else 1) + column
    value, slope = _curve(tl.load(hidden + at, mask=inside, other=0.0).to(ACCUMULATE), CURVE)
    g = tl.load(grad + row * width + column, mask=inside, other=0.0).to(ACCUMULATE)
    grad_value = g
    if IS_GATED:
        up = tl.load(hidden + at + width, mask=inside, other=0.0).to(ACCUMULATE)
        grad_up = (g * value).to(grad_hidden.dtype.element_ty)
        tl.store(grad_hidden + at + width, grad_up, mask=inside)
        grad_value = g * up
        value *= up
    grad_x = (grad_value * slope).to(grad_hidden.dtype.element_ty)
    tl.store(grad_hidden + at, grad_x, mask=inside)
    tl.store(activated + row * width + column, value.to(activated.dtype.element_ty), mask=inside)


def activate(kind: str, hidden_RH: Tensor) -> Tensor:
    """Compute `f(gate) * up` of gated kinds, else `f(hidden)`, [R, F]. One launch."""
    hidden_RH, is_gated = hidden_RH.contiguous(), kind in GATED
    rows, width = hidden_RH.shape[0], hidden_RH.shape[1] // (1 + is_gated)
    out_RF = hidden_RH.new_empty(rows, width)
    if out_RF.numel():
        block = block_of(width)
        _activate[(rows, triton.cdiv(width, block))](
            hidden_RH,
            out_RF,
            width,
            CURVE=CURVES[kind],
            IS_GATED=is_gated,
            ACCUMULATE=accumulator(hidden_RH.dtype),
            BLOCK=block,
        )
    return out_RF


def activate_backward(kind: str, hidden_RH: Tensor, grad_RF: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `activate` again, [R, F], and the gradient of its input, [R, H]. One launch."""
    hidden_RH, grad_RF, is_gated = hidden_RH.contiguous(), grad_RF.contiguous(), kind in GATED
    rows, width = grad_RF.shape
    activated_RF, grad_RH = torch.empty_like(grad_RF), torch.empty_like(hidden_RH)
    if grad_RF.numel():
        block = block_of(width)
        _activate_backward[(rows, triton.cdiv(width, block))](
            hidden_RH,
            grad_RF,
            activated_RF,
            grad_RH,
            width,
            CURVE=CURVES[kind],
            IS_GATED=is_gated,
            ACCUMULATE=accumulator(hidden_RH.dtype),
            BLOCK=block,
        )
    return activated_RF, grad_RH
