"""Routing within a compute budget, over experts of different cost.

    p = softmax(x W^T) over all experts; a token's K experts of largest p + bias are tried in
    descending order, and one is taken if
        p > min_weight        and        its cost fits what is left of the token's budget

The cost of an expert is its multiply-adds per row as a share of those of all experts, so a budget
of 1 takes everything; a zero-cost expert always fits. An expert that does not fit is skipped, and a
cheaper one further down may still be taken. Sums are in whole multiply-adds, exact on every device;
`budget * total` is rounded up by one part in 10^9, so that 0.29 of 100 is 29.

Weights are p as they are, times `scale`: renormalized, a single expert would have weight 1 whatever
the router says. A token for which nothing fits contributes zero. `selected_TK` marks the taken
experts, which come first in a token's list.

`per: sequence`: x is the mean over the real tokens of the sequence, so all of them get the same
experts (not in a causal model).

Cost in addition to `base.py`: K steps over [T], and a sort of [T, K]. Capacity counts moe.top_k
experts per token. No collective, no host sync.

Letters: T tokens, D width, E experts, K experts per token, B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmoe.config.schema import RouterConfig
from dmoe.moe.constants import HostConstant
from dmoe.moe.load_balancing.losses import mean_over_tokens
from dmoe.moe.routers.base import LearnedRouter, combine_weights, sort_experts
from dmoe.moe.routers.projection import project
from dmoe.moe.routing import ONE_SEQUENCE, BatchShape, Routing, TokenContext


class BudgetRouter(LearnedRouter):
    """Selects, by descending score, the experts that fit the token's compute budget."""

    def __init__(
        self, config: RouterConfig, dim: int, num_experts: int, top_k: int, layer: int = 0
    ) -> None:
        super().__init__(config, dim, num_experts, top_k, layer)
        self.multiply_adds = HostConstant([1] * num_experts)

    def set_expert_costs(self, multiply_adds: Sequence[int]) -> None:
        assert len(multiply_adds) == self.num_experts, (
            f"{len(multiply_adds)} costs for {self.num_experts} experts"
        )
        self.multiply_adds = HostConstant(multiply_adds)

    def forward(
        self, x_TD: Tensor, context: TokenContext, shape: BatchShape = ONE_SEQUENCE
    ) -> Routing:
        x_TD = self.router_input(x_TD, context, shape)
        logit_TE = self.logits_per_token_or_sequence(x_TD, context, shape.sequences)
        return self.select(logit_TE, logit_TE.softmax(-1), context, shape)

    def select(
        self, logit_TE: Tensor, score_TE: Tensor, context: TokenContext, shape: BatchShape
    ) -> Routing:
        expert_TK = sort_experts(score_TE.detach() + self.bias_E)[:, : self.top_k]
        enough_TK = score_TE.detach().gather(1, expert_TK) > self.config.min_weight
        budget = self.config.budget if context.budget is None else context.budget
        cost_TK = self.multiply_adds.on(score_TE.device)[expert_TK]
        taken_TK = affordable(enough_TK, cost_TK, allowance(budget, self.multiply_adds.values))
        expert_TK, taken_TK = taken_first(expert_TK, taken_TK)
        return Routing(
            expert_TK,
            combine_weights(logit_TE, score_TE, expert_TK, self.config, taken_TK),
            score_TE,
            logit_TE,
            scale=self.config.scale,
            selected_TK=taken_TK
            if context.valid_T is None
            else taken_TK & context.valid_T.unsqueeze(1),
        )

    def logits_per_token_or_sequence(
        self, x_TD: Tensor, context: TokenContext, sequences: int
    ) -> Tensor:
        """Return the logits [T, E] of each token, or of the mean over its sequence (`per`)."""
        if self.config.per == "token":
            return project(x_TD, self.weight)
        tokens = x_TD.shape[0]
        logit_BE = project(mean_over_tokens(x_TD, context.valid_T, sequences), self.weight)
        return (
            logit_BE.unsqueeze(1)
            .expand(sequences, tokens // max(1, sequences), self.num_experts)
            .reshape(tokens, self.num_experts)
        )


def allowance(budget: float, multiply_adds: Sequence[int]) -> int:
    """Return the multiply-adds that a budget buys."""
    return int(budget * sum(multiply_adds) * (1 + 1e-9))


def affordable(enough_TK: Tensor, cost_TK: Tensor, budget: int) -> Tensor:
    """Take, in order, `enough_TK` experts whose cost fits what earlier ones left; bool [T, K]."""
    left_T = torch.full_like(cost_TK[:, 0], budget)
    taken = []
    for enough_T, cost_T in zip(enough_TK.unbind(1), cost_TK.unbind(1), strict=True):
        taken.append(enough_T & (cost_T <= left_T))
        left_T = left_T - cost_T * taken[-1]
    return torch.stack(taken, 1)


def taken_first(expert_TK: Tensor, taken_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Sort the taken experts before the skipped ones.

    So a token's first choice, which an expert with a capacity serves first, is the first it can
    afford.
    """
    order_TK = taken_TK.sort(dim=1, descending=True, stable=True).indices
    return expert_TK.gather(1, order_TK), taken_TK.gather(1, order_TK)
