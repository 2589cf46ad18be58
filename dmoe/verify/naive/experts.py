"""What each expert makes of all tokens, by its formula: uniform ones, those of other shapes, those that cost nothing.

Of the real layer only the weights are taken, by their names, and the sizes of the experts' matrices.

Letters: T tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.moe.layer import MoE


def output(layer: MoE, e: int, x_TD: Tensor) -> Tensor:
    """Expert e of all tokens; ids from `layer.experts.num_experts` on are zero, copies and constants, in this order."""
    real = layer.experts.num_experts
    if e >= real:
        return _zero_cost(layer, e - real, x_TD)
    first, *others = weights(layer, e)
    rows = x_TD @ first
    for weight in others:
        rows = activation(layer.experts.kind, rows) @ weight
    return rows


def weights(layer: MoE, e: int) -> list[Tensor]:
    """The matrices of expert e, first to last."""
    named = dict(layer.experts.named_parameters())
    if "w_in" in named:
        return [named["w_in"][e], named["w_out"][e]]
    own = sorted(
        (int(name.partition(".w")[2]), name) for name in named if name.startswith(f"{e}.w")
    )
    return [named[name] for _, name in own]


def work(layer: MoE) -> list[int]:
    """Multiply-adds of a row with each expert, those of other ranks too, from the sizes of its matrices; 0 for zero-cost ones."""
    real = [sum(rows * columns for rows, columns in sizes) for sizes in layer.experts.matrices]
    return real + [0] * (layer.num_experts - len(real))


def _zero_cost(layer: MoE, place: int, x_TD: Tensor) -> Tensor:
    module = layer.zero_cost
    assert module is not None
    if place < module.zero:
        return torch.zeros_like(x_TD)
    if place < module.zero + module.copy:
        return x_TD
    return module.get_parameter("constant_JM")[place - module.zero - module.copy].expand(
        len(x_TD), -1
    )


def activation(kind: str, hidden: Tensor) -> Tensor:
    if kind == "relu":
        return hidden.clamp(min=0)
    if kind == "gelu":
        return F.gelu(hidden)
    half = hidden.shape[-1] // 2
    gate, up = hidden[..., :half], hidden[..., half:]
    return (gate * torch.sigmoid(gate) if kind == "swiglu" else F.gelu(gate)) * up
