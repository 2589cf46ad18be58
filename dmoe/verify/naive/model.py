"""Dense parts of the models by their formulas: norms, attention, feed-forwards, the transformer.

Plain autograd on plain operations; nothing from `dmoe/models` is called but the linear layers, and
those only as modules, because adapters hang on them. Fusion and the classifier's own forward are
not written again (docs/verify.md lists what stays shared).

Letters: B sequences, S tokens per sequence, D model width, H query heads, N key/value heads, A
width of a head.
"""

from __future__ import annotations

import math
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from dmoe.config.plugins import parse
from dmoe.config.schema import Config
from dmoe.models.attention import Attention
from dmoe.models.base import ModelOutput
from dmoe.models.layers import RMSNorm
from dmoe.models.transformer import Block, Transformer
from dmoe.moe.experts import FeedForward
from dmoe.moe.layer import MoE
from dmoe.moe.routing import TokenContext
from dmoe.verify.naive.layer import activation, without_padding


def install(model: nn.Module) -> None:
    """Replace the forward of every norm, attention, feed-forward and transformer of `model`."""
    replacements: list[tuple[type[nn.Module], Any]] = [
        (RMSNorm, rms_norm),
        (FeedForward, feed_forward),
        (Attention, attention),
        (Transformer, transformer),
    ]
    for module in model.modules():
        for kind, function in replacements:
            if isinstance(module, kind):
                module.forward = MethodType(function, module)


def read_settings(model: nn.Module, config: Config) -> None:
    """Take every setting from the config, not from what the constructors have made of it.

    A field that is not passed on would otherwise have its default on both sides.
    """
    moe, shape = config.moe, config.model
    for module in model.modules():
        if isinstance(module, MoE):
            module.top_k, module.capacity, module.balance = moe.top_k, moe.capacity, moe.balance
            module.virtual_ranks = config.parallel.virtual_ranks
            module.router.config, module.experts.kind = moe.router, moe.experts.kind
        elif isinstance(module, FeedForward):
            is_own = parse(moe.experts.kind) is not None
            module.kind = "swiglu" if is_own else moe.experts.kind
        elif isinstance(module, RMSNorm):
            module.eps = shape.norm_eps
        elif isinstance(module, Attention):
            module.num_heads = shape.heads
            module.num_kv_heads = shape.kv_heads or shape.heads
            module.head_dim = shape.head_dim or shape.dim // shape.heads
        elif isinstance(module, Transformer):
            module.config = shape


def rms_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    """Compute `x / sqrt(mean(x^2) + eps) * weight`."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + norm.eps) * norm.weight


def feed_forward(layer: FeedForward, x: Tensor) -> Tensor:
    """Compute `activation(x W_in) W_out`."""
    return activation(layer.kind, x @ layer.w_in.weight.t()) @ layer.w_out.weight.t()


def attention(
    layer: Attention, x_BSD: Tensor, rope_base: float, documents: list[list[slice]]
) -> Tensor:
    """Compute causal attention of each document alone, as if it were a batch of its own.

    `documents`: of each sequence, the slices of its positions.
    """
    qkv, rows = layer.w_qkv(x_BSD), []
    for b, slices in enumerate(documents):
        parts = [_attend(layer, qkv[b : b + 1, part], rope_base) for part in slices]
        rows.append(torch.cat(parts, 1))
    out: Tensor = layer.w_out(torch.cat(rows))
    return out


def documents_of(context: TokenContext, shape: torch.Size) -> list[list[slice]]:
    """Return the documents of each sequence: one starts where the position is 0."""
    sequences, length = shape
    if context.position_T is None:
        return [[slice(0, length)]] * sequences
    documents = []
    for positions in context.position_T.view(shape).tolist():
        starts = [s for s, position in enumerate(positions) if s == 0 or position == 0]
        ends = [*starts[1:], length]
        documents.append([slice(*pair) for pair in zip(starts, ends, strict=True)])
    return documents


def _attend(layer: Attention, qkv: Tensor, rope_base: float) -> Tensor:
    """Compute causal attention head by head; each key/value head serves H/N query heads."""
    heads, shared, width = layer.num_heads, layer.num_kv_heads, layer.head_dim
    columns = [qkv[..., h * width : (h + 1) * width] for h in range(heads + 2 * shared)]
    length = qkv.shape[1]
    hidden_SS = torch.ones(length, length, dtype=torch.bool).triu(1)
    outputs = []
    for h in range(heads):
        n = h // (heads // shared)
        query, key = columns[h], columns[heads + n]
        value = columns[heads + shared + n]
        if layer.q_norm is not None and layer.k_norm is not None:
            query, key = layer.q_norm(query), layer.k_norm(key)
        query, key = rotate(query, rope_base), rotate(key, rope_base)
        score_BSS = query @ key.transpose(-1, -2) / math.sqrt(width)
        score_BSS = score_BSS.masked_fill(hidden_SS, -torch.inf)
        outputs.append(torch.softmax(score_BSS, -1) @ value)
    return torch.cat(outputs, -1)


def rotate(x_BSA: Tensor, base: float) -> Tensor:
    """Turn the pair (i, i + A/2) of position s by the angle `s * base^(-2i/A)`."""
    half = x_BSA.shape[-1] // 2
    angle_SP = torch.tensor(
        [[s * base ** (-i / half) for i in range(half)] for s in range(x_BSA.shape[1])],
        dtype=torch.float64,
    )
    cos, sin = angle_SP.cos().to(x_BSA), angle_SP.sin().to(x_BSA)
    first, second = x_BSA[..., :half], x_BSA[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def transformer(
    model: Transformer,
    input: Tensor,
    target: Tensor | None = None,
    context: TokenContext | None = None,
) -> ModelOutput:
    """Compute the logits of token ids [B, S]; losses are `naive/step.py`'s."""
    assert target is None
    assert context is not None
    context = TokenContext(
        valid_T=context.valid_T,
        label_T=context.label_T,
        position_T=context.position_T,
        noise_key=context.noise_key,
        first_sequence=context.first_sequence,
        token_id_T=input.flatten(),
    )
    out = ModelOutput(None, None)
    x_BSD, rope_base = model.embedding(input), cast(Any, model.config.rope_base)
    x_BSD = without_padding(x_BSD.flatten(0, 1), context).view_as(x_BSD)
    documents = cast(Any, documents_of(context, input.shape))
    for block in model.blocks:
        assert isinstance(block, Block)
        x_BSD = x_BSD + block.attention(block.attention_norm(x_BSD), rope_base, documents)
        normed_BSD = block.feed_forward_norm(x_BSD)
        if isinstance(block.feed_forward, MoE):
            layer = block.feed_forward(normed_BSD, context)
            out.aux.append(layer.aux)
            out.stats.append(layer.stats)
            x_BSD = x_BSD + layer.y
        else:
            x_BSD = x_BSD + block.feed_forward(normed_BSD)
    weight_VD = model.embedding.weight if model.output is None else model.output.weight
    out.logits = model.norm(x_BSD) @ weight_VD.t()
    return out
