"""Rotary positions (Su et al. 2021, "RoFormer"), in the half-rotation layout of Llama and Mixtral.

Pair i of a head is (x[i], x[i + A/2]); at position s it is turned by the angle s * base^(-2i/A). The original paper pairs neighbours
instead; weights trained with one layout are wrong in the other, and Hugging Face's checkpoints have this one.

Letters: B sequences, S tokens a sequence, H heads, A width of a head, P = A/2 pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["rotary_table", "rotate", "rotate_reference"]

Rotary = tuple[Tensor, Tensor]
"""cos and signed sin, both [S, 1, A], float32 (float64 for a float64 model): first half (cos, -sin), second half (cos, sin)."""


def rotary_table(length: int, head_dim: int, base: float, dtype: torch.dtype, device: torch.device) -> Rotary:
    """The table of all layers of one forward. Never a buffer: nothing to save, to shard or to lose on the meta device.

    The angles are taken in float64, since float32 is off by 1e-3 radians at position 16384; the table is at least float32.
    """
    frequency_P = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    angle_SP = torch.arange(length, dtype=torch.float64, device=device).unsqueeze(1) * frequency_P
    cos_SP, sin_SP = angle_SP.cos(), angle_SP.sin()
    table = torch.stack([torch.cat([cos_SP, cos_SP], -1), torch.cat([-sin_SP, sin_SP], -1)]).unsqueeze(2)
    cos_S1A, sin_S1A = table.to(torch.promote_types(dtype, torch.float32))
    return cos_S1A, sin_S1A


def rotate(x_BSHA: Tensor, rotary: Rotary) -> Tensor:
    """Turn every head by its position. Computed in the table's dtype, returned in x's."""
    return _rotate(x_BSHA, *rotary)


class _Rotate(Function):
    """Backward is the rotation by the opposite angle: three passes each way where plain autograd takes three times as many."""

    @staticmethod
    def forward(ctx: Any, x_BSHA: Tensor, cos_S1A: Tensor, sin_S1A: Tensor) -> Tensor:
        ctx.save_for_backward(cos_S1A, sin_S1A)
        return _turned(x_BSHA, cos_S1A, sin_S1A)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos_S1A, sin_S1A = ctx.saved_tensors
        return _turned(grads[0], cos_S1A, -sin_S1A), None, None


_rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = _Rotate.apply


def _turned(x_BSHA: Tensor, cos_S1A: Tensor, sin_S1A: Tensor) -> Tensor:
    wide = x_BSHA.to(cos_S1A.dtype)
    partner = wide.roll(wide.shape[-1] // 2, -1)  # swaps the halves of a head
    return (wide * cos_S1A).addcmul_(partner, sin_S1A).to(x_BSHA.dtype)


def rotate_reference(x_BSHA: Tensor, base: float) -> Tensor:
    """The same as a multiplication of complex numbers, one pair each. For tests."""
    a, b = x_BSHA.double().chunk(2, -1)
    length, head_dim = x_BSHA.shape[1], x_BSHA.shape[3]
    angle = [[s * base ** (-2 * i / head_dim) for i in range(head_dim // 2)] for s in range(length)]
    angle_S1P = torch.tensor(angle, dtype=torch.float64).unsqueeze(1)
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angle_S1P), angle_S1P)
    return torch.cat([turned.real, turned.imag], -1)
