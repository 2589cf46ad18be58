"""Gated fusion: a gate for each element, read from all streams together.

    two streams:   g = sigmoid([f_1 | f_2] G + c),                     y = g * f_1 + (1 - g) * f_2
    S streams:     g = softmax over s of ([f_1 | ... | f_S] G_s + c_s),   y = sum_s g_s * f_s            (Arevalo et al. 2017, GMU)

The streams are a token's K choices in the order of the routing, so a place has a meaning for soft, constant and table routing. The last
stream's logit is 0, which makes the softmax of two exactly the sigmoid. A stream that is missing (a choice not made) is left out of the
softmax and the others share its part. G and c start at zero: the mean.
The weights only chose, so `attach` takes routers without parameters only: the gate is what is learned.
Cost: 2 S (S-1) W^2 FLOPs a token and T * S * W numbers of memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dmoe.modular.aggregation.base import Aggregation, Choice, Modules, kept
from dmoe.modular.banks.base import Bank
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
        slot_TSW = modules.slots(rows_TD, routing)
        logit_TX = slot_TSW.flatten(1) @ self.gate.to(slot_TSW.dtype) + self.bias.to(slot_TSW.dtype)
        logit_TSW = torch.cat([logit_TX, torch.zeros_like(slot_TSW[:, 0])], 1).view(slot_TSW.shape)
        missing_TS1 = ~kept(routing).unsqueeze(-1)
        nothing_T11 = missing_TS1.all(1, keepdim=True)  # padding: no stream at all, and a softmax over nothing is not a number
        gate_TSW = logit_TSW.masked_fill(missing_TS1 & ~nothing_T11, -math.inf).softmax(1)
        return (gate_TSW * slot_TSW).sum(1)

    def one(self, bank: Bank, row_D: Tensor, seen_Q: Tensor, choices: list[Choice]) -> Tensor:
        streams = [row_D.new_zeros(bank.width) for _ in range(self.top_k)]
        for choice in choices:
            streams[choice.place] = bank.one(row_D, choice.module)
        logit_X = torch.cat(streams) @ self.gate + self.bias
        logits = [*logit_X.view(-1, self.width), row_D.new_zeros(self.width)]
        total_W, mass_W = row_D.new_zeros(bank.width), row_D.new_zeros(bank.width)
        for choice in choices:
            total_W = total_W + logits[choice.place].exp() * streams[choice.place]
            mass_W = mass_W + logits[choice.place].exp()
        return total_W / mass_W if choices else total_W
