"""Causal self-attention with rotary positions, grouped queries and optional query/key norm.

Rotary positions (Su et al. 2021, "RoFormer") in the half-rotation layout of Llama and Mixtral: pair
i of a head is (x[i], x[i + A/2]), and at position s it is rotated by the angle s * base^(-2i/A).
The original paper pairs neighbours instead. Weights trained with one layout are wrong in the other;
Hugging Face's checkpoints use this one.

Letters: B sequences, S tokens per sequence, D model width, H query heads, N key/value heads (each
serves H/N query heads), A width of a head, P = A/2 rotated pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from dmoe.config.errors import ConfigError
from dmoe.config.rules.model import check_attention, head_dim
from dmoe.config.schema import ModelConfig
from dmoe.models.layers import RMSNorm
from dmoe.moe.inputs import describe
from dmoe.moe.rng import normal_
from dmoe.moe.routing import TokenContext

if TYPE_CHECKING:
    from dmoe.models.key_value_cache import LayerCache

MAX_UNFUSED_LENGTH = 256
"""Longest sequence for which matrix products beat fused bfloat16 attention on a CPU."""


class Attention(nn.Module):
    """`w_out(softmax(q k^T / sqrt(A) + causal mask) v)` with q, k, v = w_qkv(x).

    Vaswani et al. 2017; Ainslie et al. 2023 for N < H. `w_qkv` stacks the rows of the three
    projections, queries first: one GEMM instead of three. With `qk_norm`, queries and keys are
    normalized by an RMSNorm over each *head* before the rotation, as in Qwen3. OLMoE normalizes
    over the full width H*A instead, so its checkpoints do not fit this module. Padding is not
    masked: every earlier token of the sequence is attended to, or with `visible_BSS` of the
    document.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        check_attention(config)
        self.num_heads, self.head_dim = config.heads, head_dim(config)
        self.num_kv_heads = config.heads if config.kv_heads is None else config.kv_heads
        self.w_qkv = nn.Linear(
            config.dim, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim, bias=False
        )
        self.w_out = nn.Linear(self.num_heads * self.head_dim, config.dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        x_BSD: Tensor,
        rotary: Rotary,
        visible_BSS: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend causally: [B, S, D] -> [B, S, D], in autocast's dtype under autocast.

        Args:
            x_BSD: normalized input.
            rotary: see `rotary_table`.
            visible_BSS: see `visible_in_document`; None: each sequence is one document.
            cache: tokens before these, of one document, to attend to as well.
        """
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q_BSHA, k_BSNA, v_BSNA = (
            self.w_qkv(x_BSD).unflatten(-1, (sum(heads), self.head_dim)).split(heads, 2)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHA, k_BSNA = self.q_norm(q_BSHA), self.k_norm(k_BSNA)
        q_BSHA, k_BSNA = apply_rotary(q_BSHA, rotary), apply_rotary(k_BSNA, rotary)
        if cache is None:
            y_BSHA = causal_attention(q_BSHA, k_BSNA, v_BSNA, visible_BSS)
        else:
            assert visible_BSS is None, "a cache holds one document"
            y_BSHA = cache.attend(q_BSHA, k_BSNA, v_BSNA)
        out_BSD: Tensor = self.w_out(y_BSHA.flatten(2))
        return out_BSD

    def initialize(self, seed: int, name: str, std: float, out_std: float) -> None:
        """Draw the weights, keyed by (seed, parameter name).

        Args:
            seed: key of the draw.
            name: path of this module in the model.
            std: of `w_qkv`.
            out_std: of `w_out`.
        """
        normal_(self.w_qkv.weight, std, seed, f"{name}.w_qkv.weight")
        normal_(self.w_out.weight, out_std, seed, f"{name}.w_out.weight")
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.initialize()


def positions_of(context: TokenContext, input: Tensor) -> Tensor | None:
    """Return the context's positions in documents, [B, S] like the token ids, or None.

    Raises:
        ConfigError: another number of positions.
    """
    position_T = context.position_T
    if position_T is None or position_T.numel() == input.numel():
        return None if position_T is None else position_T.view(input.shape)
    allowed = f"must have the shape of the tokens, {list(input.shape)}"
    raise ConfigError("position_T", describe(position_T), allowed, "give one value per token")


def visible_in_document(position_BS: Tensor) -> Tensor:
    """Return which tokens each token attends to: itself and the earlier ones of its document.

    Returns bool [B, S, S]; a document starts at each position 0. Made once per forward: B*S*S
    bytes, while the fused kernels keep no B*H*S*S scores.
    """
    document_BS = (position_BS == 0).cumsum(1)
    return (document_BS.unsqueeze(2) == document_BS.unsqueeze(1)).tril()


def causal_attention(
    q_BSHA: Tensor, k_BSNA: Tensor, v_BSNA: Tensor, visible_BSS: Tensor | None = None
) -> Tensor:
    """Compute causal attention: torch's fused kernel, except for short bfloat16 inputs on a CPU.

    There the backward of the fused kernel takes 6 times as long as matrix products (measured at
    S=128; equal at S=512). `visible_BSS` limits it to documents. Returns [B, S, H, A].
    """
    short = (
        not q_BSHA.is_cuda
        and q_BSHA.dtype == torch.bfloat16
        and q_BSHA.shape[1] <= MAX_UNFUSED_LENGTH
    )
    if short and torch.is_grad_enabled():
        return unfused_causal_attention(q_BSHA, k_BSNA, v_BSNA, visible_BSS)
    q, k, v = (t.transpose(1, 2) for t in (q_BSHA, k_BSNA, v_BSNA))
    grouped = q.shape[1] != k.shape[1]
    mask = None if visible_BSS is None else visible_BSS.unsqueeze(1)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def unfused_causal_attention(
    q_BSHA: Tensor, k_BSNA: Tensor, v_BSNA: Tensor, visible_BSS: Tensor | None = None
) -> Tensor:
    """Compute causal attention as matrix products; memory B*H*S*S, so for short sequences only.

    The query heads of a key/value head are stacked in one GEMM.
    """
    length, num_heads, width = q_BSHA.shape[1:]
    num_kv_heads = k_BSNA.shape[2]
    queries_per_kv_head = num_heads // num_kv_heads
    q = q_BSHA.transpose(1, 2).reshape(-1, queries_per_kv_head * length, width)
    k, v = (t.transpose(1, 2).reshape(-1, length, width) for t in (k_BSNA, v_BSNA))
    if visible_BSS is None:
        hidden = torch.full((length, length), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
        mask = hidden.repeat(queries_per_kv_head, 1)
    else:
        hidden = q.new_zeros(visible_BSS.shape).masked_fill_(~visible_BSS, -torch.inf)
        mask = hidden.repeat(1, queries_per_kv_head, 1).repeat_interleave(num_kv_heads, 0)
    score = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=1 / math.sqrt(width))
    return torch.bmm(score.softmax(-1), v).view(-1, num_heads, length, width).transpose(1, 2)


Rotary = tuple[Tensor, Tensor]
"""cos and signed sin, both [S, 1, A], or [B, S, 1, A] with positions of each sequence; float32
(float64 for a float64 model).

First half of a head (cos, -sin), second half (cos, sin).
"""


def rotary_table(
    length: int,
    head_dim: int,
    base: float,
    dtype: torch.dtype,
    device: torch.device,
    position_BS: Tensor | None = None,
) -> Rotary:
    """Return the rotary table that all layers of one forward share.

    Not a buffer: nothing to save, to shard, or to lose on the meta device.

    Args:
        length: S.
        head_dim: A.
        base: of the angles, `model.rope_base`.
        dtype: of the activations; the table is at least float32.
        device: of the table.
        position_BS: position of each token in its document; None: 0 to S - 1.
    """
    # In float64: float32 angles are off by 1e-3 radians at position 16384.
    exponent_P = -torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    frequency_P = base**exponent_P
    position = torch.arange(length, device=device) if position_BS is None else position_BS
    angle = position.to(torch.float64).unsqueeze(-1) * frequency_P
    cos, sin = angle.cos(), angle.sin()
    table = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)]).unsqueeze(-2)
    cos_S1A, sin_S1A = table.to(torch.promote_types(dtype, torch.float32))
    return cos_S1A, sin_S1A


def apply_rotary(x_BSHA: Tensor, rotary: Rotary) -> Tensor:
    """Rotate every head by its position; computed in the table's dtype, returned in x's."""
    return _rotate_fn(x_BSHA, *rotary)


class _Rotate(Function):
    """Rotation with an explicit backward (opposite angle): a third of autograd's memory passes."""

    @staticmethod
    def forward(ctx: Any, x_BSHA: Tensor, cos_S1A: Tensor, sin_S1A: Tensor) -> Tensor:
        ctx.save_for_backward(cos_S1A, sin_S1A)
        return _rotate(x_BSHA, cos_S1A, sin_S1A)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos_S1A, sin_S1A = ctx.saved_tensors
        return _rotate(grads[0], cos_S1A, -sin_S1A), None, None


_rotate_fn: Callable[[Tensor, Tensor, Tensor], Tensor] = _Rotate.apply


def _rotate(x_BSHA: Tensor, cos_S1A: Tensor, sin_S1A: Tensor) -> Tensor:
    wide = x_BSHA.to(cos_S1A.dtype)
    # Swaps the halves of a head.
    partner = wide.roll(wide.shape[-1] // 2, -1)
    return (wide * cos_S1A).addcmul_(partner, sin_S1A).to(x_BSHA.dtype)
