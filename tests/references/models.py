"""Plain versions of the hand-written kernels of `dmoe.models`.

Letters: B sequences, S tokens per sequence, H query heads, N key/value heads, A width of a head,
P = A/2 rotated pairs, D model width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def causal_attention_reference(q_BSHA: Tensor, k_BSNA: Tensor, v_BSNA: Tensor) -> Tensor:
    """Compute causal attention one query at a time: [B, S, H, A]."""
    out_BSHA = torch.empty_like(q_BSHA)
    queries_per_kv_head = q_BSHA.shape[2] // k_BSNA.shape[2]
    for b, s, h in torch.cartesian_prod(*(torch.arange(n) for n in q_BSHA.shape[:3])).tolist():
        n = h // queries_per_kv_head
        score = k_BSNA[b, : s + 1, n] @ q_BSHA[b, s, h] / math.sqrt(q_BSHA.shape[3])
        out_BSHA[b, s, h] = score.softmax(0) @ v_BSNA[b, : s + 1, n]
    return out_BSHA


def apply_rotary_reference(x_BSHA: Tensor, base: float) -> Tensor:
    """Rotate each pair by a multiplication of complex numbers, in float64."""
    a, b = x_BSHA.double().chunk(2, -1)
    length, head_dim = x_BSHA.shape[1], x_BSHA.shape[3]
    angle = [[s * base ** (-2 * i / head_dim) for i in range(head_dim // 2)] for s in range(length)]
    angle_S1P = torch.tensor(angle, dtype=torch.float64).unsqueeze(1)
    rotated = torch.complex(a, b) * torch.polar(torch.ones_like(angle_S1P), angle_S1P)
    return torch.cat([rotated.real, rotated.imag], -1)


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Compute RMSNorm by its formula, with autograd's own backward."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_D
