"""Feed-forward experts, stacked on the expert dimension so that they shard, and the same feed-forward for every token.

Letters: R rows, D width in, M width out, F hidden width, H = 2F for gated kinds, else F; E experts, e experts here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.config.shapes import GATED, matrices
from dmoe.moe.dispatch import TokensPerExpert
from dmoe.moe.experts.activation import ACTIVATION_FNS
from dmoe.moe.experts.base import Experts
from dmoe.moe.experts.fused import feed_forward
from dmoe.moe.keyed import normal_
from dmoe.moe.ownership import ExpertPlacement, contiguous_placement

__all__ = ["FeedForward", "MLPExperts"]


class MLPExperts(Experts):
    """Expert e computes `activation(x @ w_in[e]) @ w_out[e]`; gated kinds split the middle in two. No biases: zero stays zero,
    so an empty slot contributes nothing, forward or backward.

    Parameters: `w_in` [e, D, H] and `w_out` [e, F, M]; of all E experts until `shard` keeps a contiguous run of them.
    Their dtype is cast to the rows' (bf16 rows under autocast, float32 master weights).
    """

    def __init__(self, kind: str, dim: int, expert_dim: int, num_experts: int, out_dim: int) -> None:
        one = matrices([expert_dim], dim, out_dim, kind)
        super().__init__(kind, (one,) * num_experts)
        self.first = 0
        self.w_in = nn.Parameter(torch.empty(num_experts, *one[0]))
        self.w_out = nn.Parameter(torch.empty(num_experts, *one[1]))

    def forward(self, rows_RD: Tensor, per_expert: TokensPerExpert) -> Tensor:
        return feed_forward(self.kind, rows_RD, self.w_in.to(rows_RD.dtype), self.w_out.to(rows_RD.dtype), per_expert)

    def placement(self, ranks: int) -> ExpertPlacement:
        return contiguous_placement(self.num_experts, ranks)

    def shard(self, placement: ExpertPlacement, rank: int) -> None:
        owned = placement.experts[rank]
        self.slice_experts(owned[0], len(owned))

    def slice_experts(self, first: int, count: int) -> None:
        """Keep only the global experts `first .. first+count-1`."""
        self.first = first
        for name in ("w_in", "w_out"):
            kept = getattr(self, name).detach()[first : first + count].clone()
            setattr(self, name, nn.Parameter(kept))

    def initialize(self, seed: int, layer: int, std: float, out_std: float) -> None:
        """Every expert from a generator of its own, keyed by its global id: the same weights at any EP size."""
        for local in range(len(self.w_in)):
            expert = self.first + local
            normal_(self.w_in[local], std, seed, "expert", layer, expert, "in")
            normal_(self.w_out[local], out_std, seed, "expert", layer, expert, "out")


class FeedForward(nn.Module):
    """One feed-forward that every token passes: a dense layer, or the shared experts of a MoE layer as one wide expert.

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
