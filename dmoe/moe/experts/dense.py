"""The dense feed-forward: a block without experts, and the shared experts of a MoE layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.config.expert_shapes import GATED
from dmoe.moe.experts.activation import ACTIVATION_FNS
from dmoe.moe.rng import normal_


class FeedForward(nn.Module):
    """A feed-forward for every token: a dense layer, or the shared experts of a MoE layer.

    n shared experts of width F are one of width n*F: their sum is the same matrix product.
    """

    def __init__(self, kind: str, dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.kind = kind
        self.w_in = nn.Linear(dim, hidden_dim * (2 if kind in GATED else 1), bias=False)
        self.w_out = nn.Linear(hidden_dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.w_in.weight.to(x.dtype))
        return F.linear(ACTIVATION_FNS[self.kind](hidden), self.w_out.weight.to(x.dtype))

    def initialize(self, seed: int, name: str, std: float, out_std: float) -> None:
        normal_(self.w_in.weight, std, seed, name, "in")
        normal_(self.w_out.weight, out_std, seed, name, "out")
