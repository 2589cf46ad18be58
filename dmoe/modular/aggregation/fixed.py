"""Aggregations without parameters: weighted sum, mean, modules in sequence, mean of the parameters.

Letters: T tokens, B sequences, K modules per token, M modules, D row width, W output width,
Q width of the router's input.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.func import functional_call

from dmoe.config.errors import ConfigError
from dmoe.modular.aggregation.base import Aggregation, DispatchedModules, ModuleChoice
from dmoe.modular.banks.base import AdapterBank
from dmoe.moe.routing import DispatchPlan, masked


class WeightedSum(Aggregation):
    """The weighted sum, which the dispatcher's combine computes (Jacobs et al. 1991).

    y_t = sum over the kept k of weight[t, k] * f_k(x_t)
    """

    def forward(
        self,
        modules: DispatchedModules,
        rows_TD: Tensor,
        router_input_TQ: Tensor,
        plan: DispatchPlan,
        sequences: int,
    ) -> Tensor:
        return modules.dispatch_and_combine(rows_TD, plan)

    def reference(
        self, bank: AdapterBank, row_D: Tensor, router_input_Q: Tensor, choices: list[ModuleChoice]
    ) -> Tensor:
        total_W = row_D.new_zeros(bank.width)
        for choice in choices:
            total_W = total_W + choice.weight * bank.reference(row_D, choice.module)
        return total_W


class Mean(Aggregation):
    """The mean of the outputs (representation averaging; Pfeiffer et al. 2023, section 5.2).

    y_t = 1/n_t * sum over the n_t kept choices of f_k(x_t)

    `attach` accepts routers without parameters only, since the weights are ignored.
    """

    uses_weights = False

    def forward(
        self,
        modules: DispatchedModules,
        rows_TD: Tensor,
        router_input_TQ: Tensor,
        plan: DispatchPlan,
        sequences: int,
    ) -> Tensor:
        keep_TK = plan.is_kept_TK.to(plan.weight_TK.dtype)
        weight_TK = keep_TK / keep_TK.sum(-1, keepdim=True).clamp(min=1)
        return modules.dispatch_and_combine(rows_TD, replace(plan, weight_TK=weight_TK))

    def reference(
        self, bank: AdapterBank, row_D: Tensor, router_input_Q: Tensor, choices: list[ModuleChoice]
    ) -> Tensor:
        outputs = [bank.reference(row_D, choice.module) for choice in choices]
        return torch.stack(outputs).mean(0) if outputs else row_D.new_zeros(bank.width)


class Stacked(Aggregation):
    """Modules in sequence, in the order of the routing (MAD-X, Pfeiffer et al. 2020).

    h_0 = h;     h_k = h_{k-1} + weight_k * f_k(h_{k-1});     the contribution is h_K - h

    Each module must read and write vectors of the frozen output's width (Adapter, Scale). A choice
    that is not kept is skipped. Cost: K dispatches and combines one after the other, so K times the
    collectives of a weighted sum under EP.
    """

    sequential = True

    def forward(
        self,
        modules: DispatchedModules,
        rows_TD: Tensor,
        router_input_TQ: Tensor,
        plan: DispatchPlan,
        sequences: int,
    ) -> Tensor:
        total_TW = modules.dispatch_and_combine(rows_TD, kth_choice(plan, 0))
        for k in range(1, plan.expert_TK.shape[1]):
            output_TW = modules.dispatch_and_combine(rows_TD + total_TW, kth_choice(plan, k))
            total_TW = total_TW + output_TW
        return total_TW

    def reference(
        self, bank: AdapterBank, row_D: Tensor, router_input_Q: Tensor, choices: list[ModuleChoice]
    ) -> Tensor:
        state_W = row_D
        for choice in choices:
            state_W = state_W + choice.weight * bank.reference(state_W, choice.module)
        return state_W - row_D


def kth_choice(plan: DispatchPlan, k: int) -> DispatchPlan:
    """Return the plan that contains only each token's k-th choice."""
    column = slice(k, k + 1)
    return replace(
        plan,
        expert_TK=plan.expert_TK[:, column],
        weight_TK=plan.weight_TK[:, column],
        keep_TK=None if plan.keep_TK is None else plan.keep_TK[:, column],
    )


class ParameterMean(Aggregation):
    """One module per sequence with averaged parameters (SMEAR, Muqeeth et al. 2023).

    theta_b = sum over m of weight[b, m] * theta_m
    weight[b, m] = mean over the sequence's tokens of their weights
    y_t = f(x_t; theta_b)

    Differentiable in the router although no choice is discrete. If f is linear in theta
    (SparseDelta, Prompt) it equals the weighted sum. For LoRA the factors are averaged, which
    differs from the mean of the products. With routing per token the mean over a sequence reads
    later tokens: for causal models see `routing/learned.py`. All modules must be on this rank.
    Cost: one module's work per token whatever K is, and B sets of parameters of memory.
    """

    def forward(
        self,
        modules: DispatchedModules,
        rows_TD: Tensor,
        router_input_TQ: Tensor,
        plan: DispatchPlan,
        sequences: int,
    ) -> Tensor:
        bank = modules.experts
        if not bank.holds_all_modules:
            raise ConfigError(
                "aggregation",
                "parameter_mean",
                "needs all modules on every rank",
                "use parallel.ep=1, or weighted_sum",
            )
        weight_BM = sequence_weights(plan, sequences)
        has_module_T = plan.is_kept_TK.any(-1)
        tokens_per_sequence = len(rows_TD) // max(1, sequences)
        out_TW = bank.forward_averaged(
            weight_BM, masked(rows_TD, has_module_T), tokens_per_sequence
        )
        return masked(out_TW, has_module_T)

    def reference(
        self, bank: AdapterBank, row_D: Tensor, router_input_Q: Tensor, choices: list[ModuleChoice]
    ) -> Tensor:
        """Apply the averaged module; `choices` are those of the whole sequence (mean weights)."""
        averaged = {
            name: torch.stack([choice.weight * value[choice.module] for choice in choices]).sum(
                0, keepdim=True
            )
            for name, value in bank.named_parameters()
        }
        out_1W: Tensor = functional_call(bank, averaged, (row_D.unsqueeze(0), 1))
        return out_1W[0]


def sequence_weights(plan: DispatchPlan, sequences: int) -> Tensor:
    """Return each sequence's mean weight per module, [B, M], over its tokens with a kept choice."""
    keep_TK = plan.is_kept_TK
    weight_TK = plan.weight_TK.masked_fill(~keep_TK, 0.0)
    weight_TM = weight_TK.new_zeros(len(weight_TK), plan.num_experts).scatter_add(
        1, plan.expert_TK, weight_TK
    )
    tokens_per_sequence = len(weight_TK) // max(1, sequences)
    routed_B1 = (
        keep_TK.any(-1).view(sequences, tokens_per_sequence).sum(1, keepdim=True).clamp(min=1)
    )
    return weight_TM.view(sequences, tokens_per_sequence, plan.num_experts).sum(1) / routed_B1
