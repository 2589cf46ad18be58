"""Concatenation and projection.

    y_t = [w_1 f_1(x_t) | ... | w_K f_K(x_t)] P,      P [K * W, W], at the start K identities: the weighted sum

The places are the order of the routing: by preference for a learned top-k, by id for soft and constant, the row's order for a
table; a place has a meaning of its own in the last three only. A choice that was not made is zeros. Cost: 2 K W^2 FLOPs and T * K *
W numbers of memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmoe.modular.aggregation.base import Aggregation, Choice, Modules
from dmoe.modular.banks.base import AdapterBank
from dmoe.moe.routing import Routing

__all__ = ["Concat"]


class Concat(Aggregation):
    per_choice = True

    def __init__(self, width: int, query: int, top_k: int) -> None:
        super().__init__(width, query, top_k)
        self.projection = nn.Parameter(torch.eye(width).repeat(top_k, 1))

    def initialize(self, seed: int, layer: int) -> None:
        with torch.no_grad():
            self.projection.copy_(torch.eye(self.width, device=self.projection.device).repeat(self.top_k, 1))

    def forward(self, modules: Modules, rows_TD: Tensor, seen_TQ: Tensor, routing: Routing, sequences: int) -> Tensor:
        slot_TKW = modules.slots(rows_TD, routing)
        weighed_TKW = slot_TKW * routing.weight_TK.to(slot_TKW.dtype).unsqueeze(-1)
        return weighed_TKW.flatten(1) @ self.projection.to(slot_TKW.dtype)

    def one(self, bank: AdapterBank, row_D: Tensor, seen_Q: Tensor, choices: list[Choice]) -> Tensor:
        parts = [row_D.new_zeros(bank.width) for _ in range(self.top_k)]
        for choice in choices:
            parts[choice.place] = choice.weight * bank.one(row_D, choice.module)
        return torch.cat(parts) @ self.projection
