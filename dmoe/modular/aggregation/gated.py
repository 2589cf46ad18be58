"""Gated fusion of a token's K choices: `dmoe.moe.gate` has the formula.

The streams are the choices in the order of the routing, so a place has a meaning for soft, constant and table routing; a choice that
was not made is a missing stream. G and c start at zero: the mean.
The weights only chose, so `attach` takes routers without parameters only: the gate is what is learned.
Cost: 2 K (K-1) W^2 FLOPs a token and T * K * W numbers of memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmoe.modular.aggregation.base import Aggregation, Choice, Modules, kept
from dmoe.modular.banks.base import AdapterBank
from dmoe.moe.gate import gated_sum, gated_sum_reference
from dmoe.moe.routing import Routing

__all__ = ["Gated"]


class Gated(Aggregation):
    per_choice = True
    weighs = False

    def __init__(self, width: int, query: int, top_k: int) -> None:
        super().__init__(width, query, top_k)
        self.gate = nn.Parameter(torch.zeros(top_k * width, (top_k - 1) * width))
        self.bias = nn.Parameter(torch.zeros((top_k - 1) * width))

    def initialize(self, seed: int, layer: int) -> None:
        with torch.no_grad():
            self.gate.zero_()
            self.bias.zero_()

    def forward(self, modules: Modules, rows_TD: Tensor, seen_TQ: Tensor, routing: Routing, sequences: int) -> Tensor:
        return gated_sum(modules.slots(rows_TD, routing), kept(routing), self.gate, self.bias)

    def one(self, bank: AdapterBank, row_D: Tensor, seen_Q: Tensor, choices: list[Choice]) -> Tensor:
        streams: list[Tensor | None] = [None] * self.top_k
        for choice in choices:
            streams[choice.place] = bank.one(row_D, choice.module)
        return gated_sum_reference(streams, self.gate, self.bias)
