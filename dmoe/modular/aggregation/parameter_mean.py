"""Parameters are joined instead of outputs: one merged module is computed for each sequence.

    theta_b = sum over m of  weight[b, m] * theta_m,      weight[b, m] = mean over the sequence's tokens of their weights
    y_t = f(x_t; theta_b)                                                                (SMEAR, Muqeeth et al. 2023)

Costs one module's work a token whatever K is, and B sets of parameters of memory. Differentiable in the router without any choice being
hard. Where f is linear in theta (SparseDelta, Prompt) it is the weighted sum; for LowRank the factors are averaged, which is another
number than the mean of the products. Causal models: see `routing/per.py`; with routing by token the mean over a sequence looks ahead.
All modules must be on this rank.

Letters: T tokens, B sequences, S tokens a sequence, K modules a token, M modules.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from dmoe.config.errors import ConfigError
from dmoe.modular.aggregation.base import Aggregation, Choice, Modules, kept
from dmoe.modular.banks.base import AdapterBank
from dmoe.moe.routing import Routing


class ParameterMean(Aggregation):
    def forward(
        self, modules: Modules, rows_TD: Tensor, seen_TQ: Tensor, routing: Routing, sequences: int
    ) -> Tensor:
        bank = modules.experts
        if not bank.whole:
            raise ConfigError(
                "aggregation",
                "parameter_mean",
                "needs all modules on every rank",
                "use parallel.ep=1, or weighted_sum",
            )
        weight_BM = sequence_weights(routing, sequences, bank.num_modules)
        made_T1 = kept(routing).any(-1, keepdim=True)
        return bank.averaged(weight_BM, rows_TD, len(rows_TD) // max(1, sequences)) * made_T1

    def one(
        self, bank: AdapterBank, row_D: Tensor, seen_Q: Tensor, choices: list[Choice]
    ) -> Tensor:
        """`choices` are those of the token's whole sequence, with their mean weights."""
        mixed = {
            name: torch.stack([choice.weight * value[choice.module] for choice in choices]).sum(
                0, keepdim=True
            )
            for name, value in bank.named_parameters()
        }
        out_1W: Tensor = functional_call(bank, mixed, (row_D.unsqueeze(0), 1))
        return out_1W[0]


def sequence_weights(routing: Routing, sequences: int, num_modules: int) -> Tensor:
    """[B, M]: the mean of the weights of a sequence's tokens, over those that were routed at all."""
    made_TK = kept(routing)
    weight_TK = routing.weight_TK.masked_fill(~made_TK, 0.0)
    weight_TM = weight_TK.new_zeros(len(weight_TK), num_modules).scatter_add(
        1, routing.expert_TK, weight_TK
    )
    each = len(weight_TK) // max(1, sequences)
    routed_B1 = made_TK.any(-1).view(sequences, each).sum(1, keepdim=True).clamp(min=1)
    return weight_TM.view(sequences, each, num_modules).sum(1) / routed_B1
