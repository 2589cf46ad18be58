"""The weighted sum, which the dispatcher's combine computes by itself.

y_t = sum over the kept k of  weight[t, k] * f_k(x_t)         (Jacobs et al. 1991; Shazeer et al. 2017)

The plain mean of the chosen modules' outputs; the weights only chose.

    y_t = 1/n_t * sum over the n_t kept choices of f_k(x_t)       (representation averaging; Pfeiffer et al. 2023, section 5.2)

A learned router would get no gradient through it, so `attach` takes routers without parameters only.

Concatenation and projection.

    y_t = [w_1 f_1(x_t) | ... | w_K f_K(x_t)] P,      P [K * W, W], at the start K identities: the weighted sum

The places are the order of the routing: by preference for a learned top-k, by id for soft and constant, the row's order for a
table; a place has a meaning of its own in the last three only. A choice that was not made is zeros. Cost: 2 K W^2 FLOPs and T * K *
W numbers of memory.

One module after the other, in the order of the routing (MAD-X, Pfeiffer et al. 2020: the language's, then the task's).

    h_0 = h;     h_k = h_{k-1} + weight_k * f_k(h_{k-1});     the contribution is h_K - h

So each module must read and write the frozen output's width (Adapter, Scale). A choice that was not made is left out.
Cost: K dispatches and combines in turn, so under EP K times the collectives of a weighted sum.

Gated fusion of a token's K choices: `dmoe.moe.gate` has the formula.

The streams are the choices in the order of the routing, so a place has a meaning for soft, constant and table routing; a choice that
was not made is a missing stream. G and c start at zero: the mean.
The weights only chose, so `attach` takes routers without parameters only: the gate is what is learned.
Cost: 2 K (K-1) W^2 FLOPs a token and T * K * W numbers of memory.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.func import functional_call

from dmoe.config.errors import ConfigError
from dmoe.modular.aggregation.base import Aggregation, ModuleChoice, DispatchedModules, keep_mask
from dmoe.modular.banks.base import AdapterBank
from dmoe.moe.routing import Routing


class WeightedSum(Aggregation):
    def forward(
        self, modules: DispatchedModules, rows_TD: Tensor, router_input_TQ: Tensor, routing: Routing, sequences: int
    ) -> Tensor:
        return modules.dispatch_and_combine(rows_TD, routing)

    def reference(
        self, bank: AdapterBank, row_D: Tensor, router_input_Q: Tensor, choices: list[ModuleChoice]
    ) -> Tensor:
        total_W = row_D.new_zeros(bank.width)
        for choice in choices:
            total_W = total_W + choice.weight * bank.reference(row_D, choice.module)
        return total_W


class Mean(Aggregation):
    uses_weights = False

    def forward(
        self, modules: DispatchedModules, rows_TD: Tensor, router_input_TQ: Tensor, routing: Routing, sequences: int
    ) -> Tensor:
        made_TK = keep_mask(routing).to(routing.weight_TK.dtype)
        return modules.dispatch_and_combine(
            rows_TD,
            replace(routing, weight_TK=made_TK / made_TK.sum(-1, keepdim=True).clamp(min=1)),
        )

    def reference(
        self, bank: AdapterBank, row_D: Tensor, router_input_Q: Tensor, choices: list[ModuleChoice]
    ) -> Tensor:
        outputs = [bank.reference(row_D, choice.module) for choice in choices]
        return torch.stack(outputs).mean(0) if outputs else row_D.new_zeros(bank.width)


class Stacked(Aggregation):
    sequential = True

    def forward(
        self, modules: DispatchedModules, rows_TD: Tensor, router_input_TQ: Tensor, routing: Routing, sequences: int
    ) -> Tensor:
        total_TW = modules.dispatch_and_combine(rows_TD, kth_choice(routing, 0))
        for k in range(1, routing.expert_TK.shape[1]):
            total_TW = total_TW + modules.dispatch_and_combine(rows_TD + total_TW, kth_choice(routing, k))
        return total_TW

    def reference(
        self, bank: AdapterBank, row_D: Tensor, router_input_Q: Tensor, choices: list[ModuleChoice]
    ) -> Tensor:
        state_W = row_D
        for choice in choices:
            state_W = state_W + choice.weight * bank.reference(state_W, choice.module)
        return state_W - row_D


def kth_choice(routing: Routing, k: int) -> Routing:
    """The routing that makes each token's k-th choice only."""
    keep_TK, one = routing.keep_TK, slice(k, k + 1)
    return replace(
        routing,
        expert_TK=routing.expert_TK[:, one],
        weight_TK=routing.weight_TK[:, one],
        keep_TK=None if keep_TK is None else keep_TK[:, one],
    )


class ParameterMean(Aggregation):
    def forward(
        self, modules: DispatchedModules, rows_TD: Tensor, router_input_TQ: Tensor, routing: Routing, sequences: int
    ) -> Tensor:
        bank = modules.experts
        if not bank.holds_all_modules:
            raise ConfigError(
                "aggregation",
                "parameter_mean",
                "needs all modules on every rank",
                "use parallel.ep=1, or weighted_sum",
            )
        weight_BM = sequence_weights(routing, sequences, bank.num_modules)
        made_T1 = keep_mask(routing).any(-1, keepdim=True)
        return bank.forward_averaged(weight_BM, rows_TD, len(rows_TD) // max(1, sequences)) * made_T1

    def reference(
        self, bank: AdapterBank, row_D: Tensor, router_input_Q: Tensor, choices: list[ModuleChoice]
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
    made_TK = keep_mask(routing)
    weight_TK = routing.weight_TK.masked_fill(~made_TK, 0.0)
    weight_TM = weight_TK.new_zeros(len(weight_TK), num_modules).scatter_add(
        1, routing.expert_TK, weight_TK
    )
    each = len(weight_TK) // max(1, sequences)
    routed_B1 = made_TK.any(-1).view(sequences, each).sum(1, keepdim=True).clamp(min=1)
    return weight_TM.view(sequences, each, num_modules).sum(1) / routed_B1
