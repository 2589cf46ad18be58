"""One module after the other, in the order of the routing (MAD-X, Pfeiffer et al. 2020: the language's, then the task's).

    h_0 = h;     h_k = h_{k-1} + weight_k * f_k(h_{k-1});     the contribution is h_K - h

So each module must read and write the frozen output's width (Adapter, Scale). A choice that was not made is left out.
Cost: K dispatches and combines in turn, so under EP K times the collectives of a weighted sum.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from dmoe.modular.aggregation.base import Aggregation, Choice, Modules
from dmoe.modular.banks.base import AdapterBank
from dmoe.moe.routing import Routing

__all__ = ["Stacked"]


class Stacked(Aggregation):
    in_sequence = True

    def forward(self, modules: Modules, rows_TD: Tensor, seen_TQ: Tensor, routing: Routing, sequences: int) -> Tensor:
        total_TW = modules.mix(rows_TD, choice(routing, 0))
        for k in range(1, routing.expert_TK.shape[1]):
            total_TW = total_TW + modules.mix(rows_TD + total_TW, choice(routing, k))
        return total_TW

    def one(self, bank: AdapterBank, row_D: Tensor, seen_Q: Tensor, choices: list[Choice]) -> Tensor:
        state_W = row_D
        for choice in choices:
            state_W = state_W + choice.weight * bank.one(state_W, choice.module)
        return state_W - row_D


def choice(routing: Routing, k: int) -> Routing:
    """The routing that makes each token's k-th choice only."""
    keep_TK, one = routing.keep_TK, slice(k, k + 1)
    return replace(
        routing,
        expert_TK=routing.expert_TK[:, one],
        weight_TK=routing.weight_TK[:, one],
        keep_TK=None if keep_TK is None else keep_TK[:, one],
    )
