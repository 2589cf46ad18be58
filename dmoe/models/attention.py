"""Causal self-attention with rotary positions, grouped queries and optional normalisation of queries and keys.

Letters: B sequences, S tokens a sequence, D model width, H query heads, N key/value heads (each serves Q = H/N query heads),
A width of one head.

Rotary positions (Su et al. 2021, "RoFormer"), in the half-rotation layout of Llama and Mixtral.

Pair i of a head is (x[i], x[i + A/2]); at position s it is turned by the angle s * base^(-2i/A). The original paper pairs neighbours
instead; weights trained with one layout are wrong in the other, and Hugging Face's checkpoints have this one.

Letters: B sequences, S tokens a sequence, H heads, A width of a head, P = A/2 pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from dmoe.config.schema import ModelConfig
from dmoe.models.layers import RMSNorm
from dmoe.moe.rng import normal_

PLAIN_UP_TO = 256
"""Sequence length up to which plain matrix products beat torch's fused bfloat16 attention on a CPU, forward and backward."""


class Attention(nn.Module):
    """`w_out(softmax(q k^T / sqrt(A) + causal mask) v)` with q, k, v = w_qkv(x) (Vaswani et al. 2017; Ainslie et al. 2023 for N < H).

    `w_qkv` stacks the rows of the three projections, queries first: one GEMM instead of three. With `qk_norm`, queries and keys
    pass an RMSNorm over each *head* before they are rotated, as in Qwen3; OLMoE normalises over the whole width H*A instead, so
    its checkpoints do not fit this module. Positions do not look at padding: every earlier token of the sequence is attended to.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads_of(config)
        self.w_qkv = nn.Linear(
            config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False
        )
        self.w_out = nn.Linear(self.heads * self.head_dim, config.dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x_BSD: Tensor, rotary: Rotary) -> Tensor:
        """[B, S, D] -> [B, S, D]; under autocast in its dtype."""
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q_BSHA, k_BSNA, v_BSNA = (
            self.w_qkv(x_BSD).unflatten(-1, (sum(heads), self.head_dim)).split(heads, 2)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHA, k_BSNA = self.q_norm(q_BSHA), self.k_norm(k_BSNA)
        y_BSHA = causal_attention(rotate(q_BSHA, rotary), rotate(k_BSNA, rotary), v_BSNA)
        out_BSD: Tensor = self.w_out(y_BSHA.flatten(2))
        return out_BSD

    def initialize(self, seed: int, name: str, std: float, out_std: float) -> None:
        """Weights keyed by (seed, parameter name)."""
        normal_(self.w_qkv.weight, std, seed, f"{name}.w_qkv.weight")
        normal_(self.w_out.weight, out_std, seed, f"{name}.w_out.weight")
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.initialize()


def heads_of(config: ModelConfig) -> tuple[int, int, int]:
    """(H, N, A) with the defaults filled in."""
    kv_heads = config.heads if config.kv_heads is None else config.kv_heads
    head_dim = config.dim // config.heads if config.head_dim is None else config.head_dim
    if config.head_dim is None and config.dim % config.heads:
        raise ValueError(
            f"model.heads={config.heads}: must divide model.dim={config.dim}, or set model.head_dim"
        )
    if config.heads % kv_heads:
        raise ValueError(f"model.kv_heads={kv_heads}: must divide model.heads={config.heads}")
    if head_dim % 2:
        raise ValueError(f"model.head_dim={head_dim}: must be even, rotary positions turn pairs")
    return config.heads, kv_heads, head_dim


def causal_attention(q_BSHA: Tensor, k_BSNA: Tensor, v_BSNA: Tensor) -> Tensor:
    """[B, S, H, A]: torch's fused attention, except for short bfloat16 sequences on a CPU.

    There the backward of the fused kernel takes 6 times as long as plain matrix products (S=128, measured; equal at S=512).
    """
    short = (
        q_BSHA.device.type == "cpu"
        and q_BSHA.dtype == torch.bfloat16
        and q_BSHA.shape[1] <= PLAIN_UP_TO
    )
    if short and torch.is_grad_enabled():
        return _plain(q_BSHA, k_BSNA, v_BSNA)
    q, k, v = (t.transpose(1, 2) for t in (q_BSHA, k_BSNA, v_BSNA))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(
        1, 2
    )


def _plain(q_BSHA: Tensor, k_BSNA: Tensor, v_BSNA: Tensor) -> Tensor:
    """The Q query heads of a key/value head stand below each other in one GEMM. Memory B*H*S*S, hence short sequences only."""
    length, heads, head_dim = q_BSHA.shape[1:]
    kv_heads = k_BSNA.shape[2]
    each = heads // kv_heads
    mask_SS = torch.full(
        (length, length), -torch.inf, dtype=q_BSHA.dtype, device=q_BSHA.device
    ).triu_(1)
    q = q_BSHA.transpose(1, 2).reshape(-1, each * length, head_dim)
    k, v = (t.transpose(1, 2).reshape(-1, length, head_dim) for t in (k_BSNA, v_BSNA))
    score = torch.baddbmm(
        mask_SS.repeat(each, 1), q, k.transpose(1, 2), alpha=1 / math.sqrt(head_dim)
    )
    return torch.bmm(score.softmax(-1), v).view(-1, heads, length, head_dim).transpose(1, 2)


Rotary = tuple[Tensor, Tensor]
"""cos and signed sin, both [S, 1, A], float32 (float64 for a float64 model): first half (cos, -sin), second half (cos, sin)."""


def rotary_table(
    length: int, head_dim: int, base: float, dtype: torch.dtype, device: torch.device
) -> Rotary:
    """The table of all layers of one forward. Never a buffer: nothing to save, to shard or to lose on the meta device.

    The angles are taken in float64, since float32 is off by 1e-3 radians at position 16384; the table is at least float32.
    """
    frequency_P = base ** (
        -torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    )
    angle_SP = torch.arange(length, dtype=torch.float64, device=device).unsqueeze(1) * frequency_P
    cos_SP, sin_SP = angle_SP.cos(), angle_SP.sin()
    table = torch.stack(
        [torch.cat([cos_SP, cos_SP], -1), torch.cat([-sin_SP, sin_SP], -1)]
    ).unsqueeze(2)
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
