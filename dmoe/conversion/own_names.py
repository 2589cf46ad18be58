"""The tensors of dmoe's transformer under the names of a published family: one table, both ways.

A piece is one tensor of the files and a view of the parameter that holds it: writing copies from
the view, reading copies into it. Stacked or transposed parts are views too:

    attention.w_qkv [(H + 2 N) A, D]     q_proj, k_proj, v_proj: runs of its rows
    experts.w_in [E, D, 2 F]             gate and up of expert e: halves of w_in[e], transposed
    experts.w_out [E, F, D]              down of expert e: w_out[e], transposed

Letters: D width, H query heads, N key/value heads, A width of a head, E experts, F hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from dmoe.conversion.own_config import Family
from dmoe.models.attention import Attention
from dmoe.models.transformer import Block, Transformer
from dmoe.moe.experts import FeedForward, MLPExperts
from dmoe.moe.layer import MoE

PARTS = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
"""Name of a MoE layer, and of its experts' gate, up and down projection."""


ALL = slice(None)


@dataclass(frozen=True)
class Piece:
    """One tensor of the files."""

    name: str
    parameter: str
    """Name of the parameter that holds it."""
    part: tuple[int | slice, ...] = ()
    """Index of its part of the parameter; all of it without one."""
    transposed: bool = False

    def view(self, parameter: Tensor) -> Tensor:
        """Return its part of the parameter, in the shape of the files."""
        part = parameter[self.part]
        return part.t() if self.transposed else part


def pieces(model: Transformer, family: Family) -> Iterator[Piece]:
    """Yield every tensor of the files of a model; their views cover every parameter once."""
    yield _whole("model.embed_tokens.weight", "embedding.weight")
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        yield from _block(block, f"model.layers.{index}", f"blocks.{index}", family)
    yield _whole("model.norm.weight", "norm.weight")
    if model.output is not None:
        yield _whole("lm_head.weight", "output.weight")


def _block(block: Block, path: str, own: str, family: Family) -> Iterator[Piece]:
    yield _whole(f"{path}.input_layernorm.weight", f"{own}.attention_norm.weight")
    yield from _attention(block.attention, f"{path}.self_attn", f"{own}.attention")
    yield _whole(f"{path}.post_attention_layernorm.weight", f"{own}.feed_forward_norm.weight")
    inner = block.feed_forward
    if isinstance(inner, MoE):
        yield from _experts(inner, path, f"{own}.feed_forward", family)
        return
    assert isinstance(inner, FeedForward)
    width, w_in = inner.w_in.weight.shape[0] // 2, f"{own}.feed_forward.w_in.weight"
    yield Piece(f"{path}.mlp.gate_proj.weight", w_in, (slice(width),))
    yield Piece(f"{path}.mlp.up_proj.weight", w_in, (slice(width, None),))
    yield _whole(f"{path}.mlp.down_proj.weight", f"{own}.feed_forward.w_out.weight")


def _attention(attention: Attention, path: str, own: str) -> Iterator[Piece]:
    start = 0
    heads = (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads)
    for name, count in zip("qkv", heads, strict=True):
        end = start + count * attention.head_dim
        yield Piece(f"{path}.{name}_proj.weight", f"{own}.w_qkv.weight", (slice(start, end),))
        start = end
    yield _whole(f"{path}.o_proj.weight", f"{own}.w_out.weight")
    if attention.q_norm is not None:
        yield _whole(f"{path}.q_norm.weight", f"{own}.q_norm.weight")
        yield _whole(f"{path}.k_norm.weight", f"{own}.k_norm.weight")


def _experts(layer: MoE, path: str, own: str, family: Family) -> Iterator[Piece]:
    assert isinstance(layer.experts, MLPExperts), "checked by family_of"
    block, (gate, up, down) = PARTS[family]
    width = layer.experts.w_in.shape[2] // 2
    yield _whole(f"{path}.{block}.gate.weight", f"{own}.router.weight")
    for e in range(layer.experts.num_experts):
        name, w_in = f"{path}.{block}.experts.{e}", f"{own}.experts.w_in"
        gate_part, up_part = (e, ALL, slice(width)), (e, ALL, slice(width, None))
        yield Piece(f"{name}.{gate}.weight", w_in, gate_part, transposed=True)
        yield Piece(f"{name}.{up}.weight", w_in, up_part, transposed=True)
        yield Piece(f"{name}.{down}.weight", f"{own}.experts.w_out", (e,), transposed=True)


def _whole(name: str, parameter: str) -> Piece:
    return Piece(name, parameter)
