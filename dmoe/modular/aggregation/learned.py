"""Aggregations with parameters: concatenation and projection, gated fusion, attention.

Letters: T tokens, K modules per token, D row width, W output width, Q width of the router's input,
A width of attention keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dmoe.modular.aggregation.base import Aggregation, DispatchedModules, ModuleChoice
from dmoe.modular.banks.base import AdapterBank
from dmoe.moe.experts.gated_fusion import gated_sum, gated_sum_reference
from dmoe.moe.rng import normal_
from dmoe.moe.routing import DispatchPlan


class Concat(Aggregation):
    """Concatenation and projection.

    y_t = [w_1 f_1(x_t) | ... | w_K f_K(x_t)] P,   P [K * W, W]; initially the weighted sum

    Positions are the order of the routing: by preference for a learned top-k, by id for soft and
    constant, by the row's order for a table. Only in the last three does a position have a fixed
    meaning. A choice that is not kept is zeros. Cost: 2 K W^2 FLOPs per token and T * K * W numbers
    of memory.
    """

    per_choice = True

    def __init__(self, width: int, router_dim: int, top_k: int) -> None:
        super().__init__(width, router_dim, top_k)
        self.projection = nn.Parameter(torch.eye(width).repeat(top_k, 1))

    def initialize(self, seed: int, layer: int) -> None:
        identity = torch.eye(self.width, device=self.projection.device)
        with torch.no_grad():
            self.projection.copy_(identity.repeat(self.top_k, 1))

    def forward(
        self,
        modules: DispatchedModules,
        rows_TD: Tensor,
        router_input_TQ: Tensor,
        plan: DispatchPlan,
        sequences: int,
    ) -> Tensor:
        output_TKW = modules.per_choice_outputs(rows_TD, plan)
        weighted_TKW = output_TKW * plan.weight_TK.to(output_TKW.dtype).unsqueeze(-1)
        return weighted_TKW.flatten(1) @ self.projection.to(output_TKW.dtype)

    def reference(
        self, bank: AdapterBank, row_D: Tensor, router_input_Q: Tensor, choices: list[ModuleChoice]
    ) -> Tensor:
        parts = [row_D.new_zeros(bank.width) for _ in range(self.top_k)]
        for choice in choices:
            parts[choice.position] = choice.weight * bank.reference(row_D, choice.module)
        return torch.cat(parts) @ self.projection


class Gated(Aggregation):
    """Gated fusion of a token's K choices; `gated_sum` has the formula.

    The choices are inputs in the order of the routing, so an input has a fixed meaning for soft,
    constant and table routing. A choice that is not kept is a missing input. The parameters start
    at zero, which is the mean. The weights are ignored, so `attach` accepts routers without
    parameters only. Cost: 2 K (K-1) W^2 FLOPs per token and T * K * W numbers of memory.
    """

    per_choice = True
    uses_weights = False

    def __init__(self, width: int, router_dim: int, top_k: int) -> None:
        super().__init__(width, router_dim, top_k)
        self.gate = nn.Parameter(torch.zeros(top_k * width, (top_k - 1) * width))
        self.bias = nn.Parameter(torch.zeros((top_k - 1) * width))

    def initialize(self, seed: int, layer: int) -> None:
        with torch.no_grad():
            self.gate.zero_()
            self.bias.zero_()

    def forward(
        self,
        modules: DispatchedModules,
        rows_TD: Tensor,
        router_input_TQ: Tensor,
        plan: DispatchPlan,
        sequences: int,
    ) -> Tensor:
        output_TKW = modules.per_choice_outputs(rows_TD, plan)
        return gated_sum(output_TKW, plan.is_kept_TK, self.gate, self.bias)

    def reference(
        self, bank: AdapterBank, row_D: Tensor, router_input_Q: Tensor, choices: list[ModuleChoice]
    ) -> Tensor:
        outputs: list[Tensor | None] = [None] * self.top_k
        for choice in choices:
            outputs[choice.position] = bank.reference(row_D, choice.module)
        return gated_sum_reference(outputs, self.gate, self.bias)


class Attention(Aggregation):
    """Attention over modules (AdapterFusion, Pfeiffer et al. 2021).

    s_k = (h_t Q) . (f_k K) / sqrt(A)
    a_k = w_k exp(s_k) / sum over the kept j of w_j exp(s_j)
    y_t = sum_k a_k (f_k V)

    h is the router's input: for adapters the frozen output, as in the paper. The paper has no
    routing: with equal weights w this is its formula, up to the division by sqrt(A). Other weights
    are the prior of the attention, through which a learned router gets its gradient; they must not
    be negative. V starts as the identity (as in the paper), Q and K random.
    Cost: 2 A (Q + K W) + 2 K W^2 FLOPs per token and T * K * W numbers of memory.
    """

    def __init__(
        self, width: int, router_dim: int, top_k: int, *, key_dim: int | None = None
    ) -> None:
        """Create it; `key_dim` is A, by default W but at most 64."""
        super().__init__(width, router_dim, top_k)
        self.key_dim = min(width, 64) if key_dim is None else key_dim
        self.query_weight = nn.Parameter(torch.empty(router_dim, self.key_dim))
        self.key_weight = nn.Parameter(torch.empty(width, self.key_dim))
        self.value_weight = nn.Parameter(torch.empty(width, width))
        self.initialize(0, 0)

    def initialize(self, seed: int, layer: int) -> None:
        query_std = 1 / math.sqrt(self.router_dim)
        normal_(self.query_weight, query_std, seed, "aggregation", layer, "query")
        normal_(self.key_weight, 1 / math.sqrt(self.width), seed, "aggregation", layer, "key")
        with torch.no_grad():
            self.value_weight.copy_(torch.eye(self.width, device=self.value_weight.device))

    def forward(
        self,
        modules: DispatchedModules,
        rows_TD: Tensor,
        router_input_TQ: Tensor,
        plan: DispatchPlan,
        sequences: int,
    ) -> Tensor:
        output_TKW = modules.per_choice_outputs(rows_TD, plan)
        dtype = output_TKW.dtype
        query_TA = router_input_TQ.to(dtype) @ self.query_weight.to(dtype)
        key_TKA = output_TKW @ self.key_weight.to(dtype)
        score_TK = torch.einsum("ta,tka->tk", query_TA, key_TKA) / math.sqrt(self.key_dim)
        score_TK = score_TK.to(plan.weight_TK.dtype)
        attention_TK = attention_weights(score_TK, plan.weight_TK, plan.is_kept_TK).to(dtype)
        mixed_TW = torch.einsum("tk,tkw->tw", attention_TK, output_TKW)
        return mixed_TW @ self.value_weight.to(dtype)

    def reference(
        self, bank: AdapterBank, row_D: Tensor, router_input_Q: Tensor, choices: list[ModuleChoice]
    ) -> Tensor:
        total_W, mass = row_D.new_zeros(bank.width), row_D.new_zeros(())
        query_A = router_input_Q @ self.query_weight
        for choice in choices:
            output_W = bank.reference(row_D, choice.module)
            score = query_A @ (output_W @ self.key_weight) / math.sqrt(self.key_dim)
            total_W = total_W + choice.weight * score.exp() * output_W
            mass = mass + choice.weight * score.exp()
        return total_W / mass @ self.value_weight if choices else total_W


def attention_weights(score_TK: Tensor, prior_TK: Tensor, keep_TK: Tensor) -> Tensor:
    """Return `prior * exp(score)` over the kept choices, normalized to sum 1, [T, K].

    Zeros for a token without kept choices. A choice with prior 0 has weight 0, so its score is not
    part of the maximum that is subtracted for numerical stability.
    """
    keep_TK = keep_TK & (prior_TK > 0)
    masked_TK = score_TK.detach().masked_fill(~keep_TK, -math.inf)
    # a token without kept choices has maximum -inf; the clamp avoids -inf - -inf
    largest_T1 = masked_TK.amax(-1, keepdim=True).clamp(min=torch.finfo(score_TK.dtype).min)
    mass_TK = (score_TK - largest_T1).masked_fill(~keep_TK, 0.0).exp() * prior_TK
    mass_TK = mass_TK.masked_fill(~keep_TK, 0.0)
    return mass_TK / (mass_TK.sum(-1, keepdim=True) + 1e-20)
