"""The plain mean of the chosen modules' outputs; the weights only chose.

    y_t = 1/n_t * sum over the n_t kept choices of f_k(x_t)       (representation averaging; Pfeiffer et al. 2023, section 5.2)

A learned router would get no gradient through it, so `attach` takes routers without parameters only.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dmoe.modular.aggregation.base import Aggregation, Choice, Modules, kept
from dmoe.modular.banks.base import AdapterBank
from dmoe.moe.routing import Routing

__all__ = ["Mean"]


class Mean(Aggregation):
    weighs = False

    def forward(self, modules: Modules, rows_TD: Tensor, seen_TQ: Tensor, routing: Routing, sequences: int) -> Tensor:
        made_TK = kept(routing).to(routing.weight_TK.dtype)
        return modules.mix(rows_TD, replace(routing, weight_TK=made_TK / made_TK.sum(-1, keepdim=True).clamp(min=1)))

    def one(self, bank: AdapterBank, row_D: Tensor, seen_Q: Tensor, choices: list[Choice]) -> Tensor:
        outputs = [bank.one(row_D, choice.module) for choice in choices]
        return torch.stack(outputs).mean(0) if outputs else row_D.new_zeros(bank.width)
