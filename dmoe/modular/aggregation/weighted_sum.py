"""The weighted sum, which the dispatcher's combine computes by itself.

y_t = sum over the kept k of  weight[t, k] * f_k(x_t)         (Jacobs et al. 1991; Shazeer et al. 2017)
"""

from __future__ import annotations

from torch import Tensor

from dmoe.modular.aggregation.base import Aggregation, Choice, Modules
from dmoe.modular.banks.base import AdapterBank
from dmoe.moe.routing import Routing

__all__ = ["WeightedSum"]


class WeightedSum(Aggregation):
    def forward(self, modules: Modules, rows_TD: Tensor, seen_TQ: Tensor, routing: Routing, sequences: int) -> Tensor:
        return modules.mix(rows_TD, routing)

    def one(self, bank: AdapterBank, row_D: Tensor, seen_Q: Tensor, choices: list[Choice]) -> Tensor:
        total_W = row_D.new_zeros(bank.width)
        for choice in choices:
            total_W = total_W + choice.weight * bank.one(row_D, choice.module)
        return total_W
