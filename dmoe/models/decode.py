"""One decoding step: the forward of a `Transformer` for one new token per text, in few calls.

With one row per text a kernel takes no longer than the Python around it. So this is the forward
without what training needs: modules, autograd functions, auxiliary losses, counts. It is the same
network up to rounding; `can_decode` says for which models it may stand in for their forward.

Letters: B texts (one new token each), D model width, H query heads, N key/value heads, A width of a
head, K experts per token, F hidden width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.models.attention import Attention, Rotary
from dmoe.models.key_value_cache import KeyValueCache, LayerCache
from dmoe.models.transformer import Block, Transformer
from dmoe.moe.base_layer import with_budget
from dmoe.moe.capacity import dropless_plan
from dmoe.moe.dispatch import PackedLocal, expert_dtype
from dmoe.moe.experts.activation import activate
from dmoe.moe.experts.grouped_mlp import MLPExperts
from dmoe.moe.layer import MoE
from dmoe.moe.placement import to_physical_experts
from dmoe.moe.routing import BatchShape, DispatchPlan, TokenContext


def can_decode(model: nn.Module) -> bool:
    """Return whether `Decoder` computes what the model's forward does.

    False for a subclass, for weights that are not whole here until a forward gathers them (FSDP2),
    and where a hook may change an input or output.
    """
    return (
        type(model) is Transformer
        and all(type(p) is nn.Parameter for p in model.parameters())
        and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    )


class Decoder:
    """The weights of a model, ready for decoding steps; made anew for each generation."""

    def __init__(self, model: Transformer) -> None:
        self.model, self.eps = model, model.config.norm_eps
        self.blocks = [_BlockWeights.of(block) for block in model.blocks]
        self.output_VD = model.embedding.weight if model.output is None else model.output.weight

    @torch.inference_mode()
    def step(self, token_B: Tensor, context: TokenContext, cache: KeyValueCache) -> Tensor:
        """Return the logits after one more token of each text in the cache, [B, V].

        Args:
            token_B: int64.
            context: `token_id_T` and `label_T` of the tokens.
            cache: holds the tokens before, and then these too.
        """
        x_BD = F.embedding(token_B, self.model.embedding.weight)
        rotary = cache.rotary(1)
        for block, layer_cache in zip(self.blocks, cache.layers, strict=True):
            h_BD = self._norm(x_BD, block.attention_norm_D)
            x_BD = x_BD + self._attend(block, h_BD, rotary, layer_cache)
            h_BD = self._norm(x_BD, block.feed_forward_norm_D)
            if isinstance(block.feed_forward, MoE):
                x_BD = x_BD + mix_experts(block.feed_forward, h_BD, context)
            else:
                x_BD = x_BD + block.feed_forward(h_BD)
        cache.advance(1)
        return F.linear(self._norm(x_BD, self.model.norm.weight), self.output_VD)

    def _attend(
        self, block: _BlockWeights, x_BD: Tensor, rotary: Rotary, cache: LayerCache
    ) -> Tensor:
        """Compute `Attention` for one token per text."""
        cos, sin = rotary
        heads, kv_heads = block.heads
        qkv_BGA = F.linear(x_BD, block.w_qkv).view(len(x_BD), heads + 2 * kv_heads, -1)
        qk_BGA, v_BNA = qkv_BGA[:, :-kv_heads], qkv_BGA[:, -kv_heads:]
        if block.qk_norm_GA is not None:
            qk_BGA = self._norm(qk_BGA, block.qk_norm_GA)
        wide = qk_BGA.to(cos.dtype)
        partner = wide.roll(wide.shape[-1] // 2, -1)
        turned_BGA = (wide * cos).addcmul_(partner, sin).to(qkv_BGA.dtype)
        q_BHA, k_BNA = turned_BGA[:, :heads], turned_BGA[:, heads:]
        y_B1HA = cache.attend(q_BHA.unsqueeze(1), k_BNA.unsqueeze(1), v_BNA.unsqueeze(1))
        return F.linear(y_B1HA.flatten(1), block.w_out)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Compute `RMSNorm` over the last dimension, in float32 at least also under autocast."""
        if x.dtype == torch.bfloat16 or x.dtype == torch.float16:
            return self._norm(x.float(), weight).to(x.dtype)
        mean = x.square().sum(-1, keepdim=True).mul_(1 / x.shape[-1])
        return (x * mean.add_(self.eps).rsqrt_()).mul_(weight)


class _BlockWeights(NamedTuple):
    attention_norm_D: Tensor
    w_qkv: Tensor
    qk_norm_GA: Tensor | None
    """Weights of the norms of each query and key head, [H + N, A]."""
    w_out: Tensor
    feed_forward_norm_D: Tensor
    feed_forward: nn.Module
    heads: tuple[int, int]
    """H and N."""

    @classmethod
    def of(cls, block: nn.Module) -> _BlockWeights:
        assert isinstance(block, Block)
        attention: Attention = block.attention
        heads, qk_norm_GA = (attention.num_heads, attention.num_kv_heads), None
        if attention.q_norm is not None and attention.k_norm is not None:
            weights = (attention.q_norm.weight, attention.k_norm.weight)
            parts = [weight_A.expand(n, -1) for weight_A, n in zip(weights, heads, strict=True)]
            qk_norm_GA = torch.cat(parts)
        return cls(
            block.attention_norm.weight,
            attention.w_qkv.weight,
            qk_norm_GA,
            attention.w_out.weight,
            block.feed_forward_norm.weight,
            block.feed_forward,
            heads,
        )


def mix_experts(layer: MoE, x_TD: Tensor, context: TokenContext) -> Tensor:
    """Compute a dropless `MoE` layer, [T, D], without losses and counts."""
    context = with_budget(context, None, layer.router.config)
    routing = layer.router(x_TD, context, BatchShape(len(x_TD)))
    plan, rows_TD = dropless_plan(routing, layer.num_zero_cost), x_TD.to(expert_dtype(x_TD))
    experts, is_local = layer.experts, isinstance(layer.packed, PackedLocal)
    is_one = len(x_TD) == 1 and not layer.num_zero_cost and not x_TD.is_cuda
    if is_one and is_local and isinstance(experts, MLPExperts):
        y_TM = _experts_of_one(experts, rows_TD, plan)
        return layer.add_local_experts(y_TM, x_TD, plan)
    sent_RD, count, metadata = layer.packed.dispatch(
        rows_TD, to_physical_experts(plan, layer.placement)
    )
    y_TM = layer.packed.combine(experts(sent_RD, count), plan.weight_TK, metadata)
    return layer.add_local_experts(y_TM, x_TD, plan)


def _experts_of_one(experts: MLPExperts, x_1D: Tensor, plan: DispatchPlan) -> Tensor:
    """Compute the experts of one token one by one, without sorting rows: [1, M].

    Only their weights are cast to the row's dtype.
    """
    dtype, chosen = x_1D.dtype, plan.expert_TK[0].tolist()
    weight_1K = plan.weight_TK
    if plan.keep_TK is not None:
        kept = plan.keep_TK[0].tolist()
        chosen = [expert for expert, keep in zip(chosen, kept, strict=True) if keep]
        weight_1K = weight_1K[:, plan.keep_TK[0]]
    if not chosen:
        return x_1D.new_zeros(1, experts.w_out.shape[2])
    rows_KM = torch.cat(
        [
            activate(experts.kind, x_1D @ experts.w_in[e].to(dtype)) @ experts.w_out[e].to(dtype)
            for e in chosen
        ]
    )
    return weight_1K.to(dtype) @ rows_KM
