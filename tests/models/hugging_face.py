"""Weights of a dmoe model under Hugging Face's names, to compare both implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn

from dmoe.models.transformer import Transformer
from dmoe.moe.layer import MoE

Tensors = dict[str, Tensor]


def hugging_face_names(
    model: Transformer, value: Callable[[nn.Parameter], Tensor], experts: str
) -> Tensors:
    """Return `value` (weight or gradient) of every parameter under its name in transformers.

    `experts` is the path of the MoE layer's experts.
    """
    out: Tensors = {
        "model.embed_tokens.weight": value(model.embedding.weight),
        "model.norm.weight": value(model.norm.weight),
    }
    if model.output is not None:
        out["lm_head.weight"] = value(model.output.weight)
    for index, block in enumerate(model.blocks):
        path, attention, inner = f"model.layers.{index}", block.attention, block.feed_forward
        out[f"{path}.input_layernorm.weight"] = value(block.attention_norm.weight)
        out[f"{path}.post_attention_layernorm.weight"] = value(block.feed_forward_norm.weight)
        widths = [
            n * attention.head_dim
            for n in (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads)
        ]
        for name, part in zip("qkv", value(attention.w_qkv.weight).split(widths), strict=True):
            out[f"{path}.self_attn.{name}_proj.weight"] = part
        out[f"{path}.self_attn.o_proj.weight"] = value(attention.w_out.weight)
        if attention.q_norm is not None:
            out[f"{path}.self_attn.q_norm.weight"] = value(attention.q_norm.weight)
            out[f"{path}.self_attn.k_norm.weight"] = value(attention.k_norm.weight)
        if isinstance(inner, MoE):
            out[f"{path}.mlp.gate.weight"] = value(inner.router.weight)
            out[f"{path}.{experts}.gate_up_proj"] = value(inner.experts.w_in).transpose(1, 2)
            out[f"{path}.{experts}.down_proj"] = value(inner.experts.w_out).transpose(1, 2)
        else:
            gate, up = value(inner.w_in.weight).chunk(2)
            out |= {f"{path}.mlp.gate_proj.weight": gate, f"{path}.mlp.up_proj.weight": up}
            out[f"{path}.mlp.down_proj.weight"] = value(inner.w_out.weight)
    return out


@contextmanager
def everything_in_float64() -> Iterator[None]:
    """Let `torch.float32` mean float64.

    transformers rounds norms, router scores and rotary angles to float32 even in a float64 model.
    With this, two implementations can be compared far below the rounding of float32.
    """
    with (
        patch.multiple(torch, float32=torch.float64, float=torch.float64),
        patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield
