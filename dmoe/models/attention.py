"""Causal self-attention with rotary positions, grouped queries and optional normalisation of queries and keys.

Letters: B sequences, S tokens a sequence, D model width, H query heads, N key/value heads (each serves Q = H/N query heads),
A width of one head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.config.schema import ModelConfig
from dmoe.models.norm import RMSNorm
from dmoe.models.rotary import Rotary, rotate
from dmoe.moe.keyed import normal_

__all__ = ["Attention", "causal_attention", "causal_attention_reference"]

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
        self.w_qkv = nn.Linear(config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.w_out = nn.Linear(self.heads * self.head_dim, config.dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x_BSD: Tensor, rotary: Rotary) -> Tensor:
        """[B, S, D] -> [B, S, D]; under autocast in its dtype."""
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q_BSHA, k_BSNA, v_BSNA = self.w_qkv(x_BSD).unflatten(-1, (sum(heads), self.head_dim)).split(heads, 2)
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
        raise ValueError(f"model.heads={config.heads}: must divide model.dim={config.dim}, or set model.head_dim")
    if config.heads % kv_heads:
        raise ValueError(f"model.kv_heads={kv_heads}: must divide model.heads={config.heads}")
    if head_dim % 2:
        raise ValueError(f"model.head_dim={head_dim}: must be even, rotary positions turn pairs")
    return config.heads, kv_heads, head_dim


def causal_attention(q_BSHA: Tensor, k_BSNA: Tensor, v_BSNA: Tensor) -> Tensor:
    """[B, S, H, A]: torch's fused attention, except for short bfloat16 sequences on a CPU.

    There the backward of the fused kernel takes 6 times as long as plain matrix products (S=128, measured; equal at S=512).
    """
    short = q_BSHA.device.type == "cpu" and q_BSHA.dtype == torch.bfloat16 and q_BSHA.shape[1] <= PLAIN_UP_TO
    if short and torch.is_grad_enabled():
        return _plain(q_BSHA, k_BSNA, v_BSNA)
    q, k, v = (t.transpose(1, 2) for t in (q_BSHA, k_BSNA, v_BSNA))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


def _plain(q_BSHA: Tensor, k_BSNA: Tensor, v_BSNA: Tensor) -> Tensor:
    """The Q query heads of a key/value head stand below each other in one GEMM. Memory B*H*S*S, hence short sequences only."""
    length, heads, head_dim = q_BSHA.shape[1:]
    kv_heads = k_BSNA.shape[2]
    each = heads // kv_heads
    mask_SS = torch.full((length, length), -torch.inf, dtype=q_BSHA.dtype, device=q_BSHA.device).triu_(1)
    q = q_BSHA.transpose(1, 2).reshape(-1, each * length, head_dim)
    k, v = (t.transpose(1, 2).reshape(-1, length, head_dim) for t in (k_BSNA, v_BSNA))
    score = torch.baddbmm(mask_SS.repeat(each, 1), q, k.transpose(1, 2), alpha=1 / math.sqrt(head_dim))
    return torch.bmm(score.softmax(-1), v).view(-1, heads, length, head_dim).transpose(1, 2)


def causal_attention_reference(q_BSHA: Tensor, k_BSNA: Tensor, v_BSNA: Tensor) -> Tensor:
    """One query at a time. For tests."""
    out_BSHA = torch.empty_like(q_BSHA)
    each = q_BSHA.shape[2] // k_BSNA.shape[2]
    for b, s, h in torch.cartesian_prod(*(torch.arange(n) for n in q_BSHA.shape[:3])).tolist():
        score = k_BSNA[b, : s + 1, h // each] @ q_BSHA[b, s, h] / math.sqrt(q_BSHA.shape[3])
        out_BSHA[b, s, h] = score.softmax(0) @ v_BSNA[b, : s + 1, h // each]
    return out_BSHA
