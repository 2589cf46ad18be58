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
        return self.output(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """Compute the first product."""
        return F.linear(x, self.w_in.weight.to(x.dtype))

    def output(self, hidden: Tensor) -> Tensor:
        """Compute the activation and the second product."""
        return F.linear(ACTIVATION_FNS[self.kind](hidden), self.w_out.weight.to(hidden.dtype))

    def initialize(self, seed: int, name: str, std: float, out_std: float) -> None:
        normal_(self.w_in.weight, std, seed, name, "in")
        normal_(self.w_out.weight, out_std, seed, name, "out")


class InSteps:
    """The output of a feed-forward that is computed one product at a time, when it is asked for.

    Args:
        module: the feed-forward.
        x: its input.
    """

    def __init__(self, module: FeedForward, x: Tensor) -> None:
        self.module, self.value, self.done = module, x, 0

    def advance(self) -> None:
        """Compute the next of the two products."""
        step = (self.module.hidden, self.module.output)[self.done]
        self.value, self.done = step(self.value), self.done + 1

    def result(self) -> Tensor:
        """Compute what is left and return the output."""
        if self.done == 0:
            self.value, self.done = self.module(self.value), 2
        elif self.done == 1:
            self.advance()
        return self.value
