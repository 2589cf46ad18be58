"""Attention over modules (AdapterFusion, Pfeiffer et al. 2021).

    s_k = (h_t Q) . (f_k K) / sqrt(A)         a_k = w_k exp(s_k) / sum over the kept j of w_j exp(s_j)         y_t = sum_k a_k (f_k V)

h is what the router sees: for adapters the frozen output, as in the paper. The paper has no routing: with equal weights w this is its
formula (up to the division by sqrt(A)); with others w is the prior of the attention, which is also how a learned router gets its
gradient. Weights must not be negative. V starts as the identity (the paper's choice), Q and K random.
Cost: 2 A (Q + K W) + 2 K W^2 FLOPs a token and T * K * W numbers of memory.

Letters: A width of the attention's keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dmoe.modular.aggregation.base import Aggregation, ModuleChoice, DispatchedModules, keep_mask
from dmoe.modular.banks.base import AdapterBank
from dmoe.moe.gated_fusion import gated_sum, gated_sum_reference
from dmoe.moe.rng import normal_
from dmoe.moe.routing import Routing


class Attention(Aggregation):
    def __init__(self, width: int, router_dim: int, top_k: int, *, key_dim: int | None = None) -> None:
        super().__init__(width, router_dim, top_k)
        self.key_dim = min(width, 64) if key_dim is None else key_dim
        self.query_weight = nn.Parameter(torch.empty(query, self.key_dim))
        self.key_weight = nn.Parameter(torch.empty(width, self.key_dim))
        self.value_weight = nn.Parameter(torch.empty(width, width))
        self.initialize(0, 0)

    def initialize(self, seed: int, layer: int) -> None:
        normal_(self.query_weight, 1 / math.sqrt(self.router_dim), seed, "aggregation", layer, "query")
        normal_(self.key_weight, 1 / math.sqrt(self.width), seed, "aggregation", layer, "key")
        with torch.no_grad():
            self.value_weight.copy_(torch.eye(self.width, device=self.value_weight.device))

    def forward(
        self, modules: DispatchedModules, rows_TD: Tensor, router_input_TQ: Tensor, routing: Routing, sequences: int
    ) -> Tensor:
        slot_TKW = modules.per_choice_outputs(rows_TD, routing)
        dtype = slot_TKW.dtype
        query_TA = router_input_TQ.to(dtype) @ self.query_weight.to(dtype)
        score_TK = torch.einsum(
            "ta,tka->tk", query_TA, slot_TKW @ self.key_weight.to(dtype)
        ) / math.sqrt(self.key_dim)
        share_TK = attention_shares(
            score_TK.to(routing.weight_TK.dtype), routing.weight_TK, keep_mask(routing)
        ).to(dtype)
        return torch.einsum("tk,tkw->tw", share_TK, slot_TKW) @ self.value_weight.to(dtype)

    def reference(
        self, bank: AdapterBank, row_D: Tensor, router_input_Q: Tensor, choices: list[ModuleChoice]
    ) -> Tensor:
        total_W, mass = row_D.new_zeros(bank.width), row_D.new_zeros(())
        for choice in choices:
            output_W = bank.reference(row_D, choice.module)
            score = (
                (router_input_Q @ self.query_weight)
                @ (output_W @ self.key_weight)
                / math.sqrt(self.key_dim)
            )
            total_W = total_W + choice.weight * score.exp() * output_W
            mass = mass + choice.weight * score.exp()
        return total_W / mass @ self.value_weight if choices else total_W


def attention_shares(score_TK: Tensor, prior_TK: Tensor, made_TK: Tensor) -> Tensor:
    """`prior * exp(score)` over the made choices, summing to 1; zeros for a token without any.

    A choice whose prior is 0 has no share, so its score must not be the largest that the others are measured by.
    """
    made_TK = made_TK & (prior_TK > 0)
    largest_T1 = (
        score_TK.detach()
        .masked_fill(~made_TK, -math.inf)
        .amax(-1, keepdim=True)
        .clamp(min=torch.finfo(score_TK.dtype).min)
    )
    mass_TK = ((score_TK - largest_T1).masked_fill(~made_TK, 0.0).exp() * prior_TK).masked_fill(
        ~made_TK, 0.0
    )
    return mass_TK / (mass_TK.sum(-1, keepdim=True) + 1e-20)


class Concat(Aggregation):
    per_choice = True

    def __init__(self, width: int, router_dim: int, top_k: int) -> None:
        super().__init__(width, router_dim, top_k)
        self.projection = nn.Parameter(torch.eye(width).repeat(top_k, 1))

    def initialize(self, seed: int, layer: int) -> None:
        with torch.no_grad():
            self.projection.copy_(
                torch.eye(self.width, device=self.projection.device).repeat(self.top_k, 1)
            )

    def forward(
        self, modules: DispatchedModules, rows_TD: Tensor, router_input_TQ: Tensor, routing: Routing, sequences: int
    ) -> Tensor:
        slot_TKW = modules.per_choice_outputs(rows_TD, routing)
        weighed_TKW = slot_TKW * routing.weight_TK.to(slot_TKW.dtype).unsqueeze(-1)
        return weighed_TKW.flatten(1) @ self.projection.to(slot_TKW.dtype)

    def reference(
        self, bank: AdapterBank, row_D: Tensor, router_input_Q: Tensor, choices: list[ModuleChoice]
    ) -> Tensor:
        parts = [row_D.new_zeros(bank.width) for _ in range(self.top_k)]
        for choice in choices:
            parts[choice.position] = choice.weight * bank.reference(row_D, choice.module)
        return torch.cat(parts) @ self.projection


class Gated(Aggregation):
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
        self, modules: DispatchedModules, rows_TD: Tensor, router_input_TQ: Tensor, routing: Routing, sequences: int
    ) -> Tensor:
        return gated_sum(modules.per_choice_outputs(rows_TD, routing), keep_mask(routing), self.gate, self.bias)

    def reference(
        self, bank: AdapterBank, row_D: Tensor, router_input_Q: Tensor, choices: list[ModuleChoice]
    ) -> Tensor:
        streams: list[Tensor | None] = [None] * self.top_k
        for choice in choices:
            streams[choice.position] = bank.reference(row_D, choice.module)
        return gated_sum_reference(streams, self.gate, self.bias)
