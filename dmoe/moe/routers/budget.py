"""Routing within a compute budget, over experts of different cost (the project's "dynamic architecture").

    p = softmax(x W^T) over all experts; a token's K experts of largest p + bias are asked in descending order, and one is taken if
        p > min_weight        and        its cost fits what is left of the token's budget

The cost of an expert is its multiply-adds a row as a share of those of all experts together, so a budget of 1 lets everything run;
an expert of zero cost always fits. One that does not fit is passed over, and a cheaper one further down may still be taken. Sums are
in whole multiply-adds, exact on every device; `budget * total` is rounded up by one part in 10^9, so that 0.29 of 100 is 29.

Weights are p as they are, times `scale`: renormalised, an expert that is alone would weigh 1 whatever the router says. A token for
which nothing fits contributes zero. `keep_TK` marks what was taken, which comes first in a token's list.

`per: sequence`: x is the mean over the real tokens of the sequence, so all of them go the same way (not in a causal model).

Cost beside `learned.py`: K steps over [T], and a sort of [T, K]. Capacity counts moe.top_k choices a token. No collective,
no host sync.

Letters: T tokens, D width, E experts, K experts a token, B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmoe.config.schema import RouterConfig
from dmoe.moe.load_balancing.groups import mean_over_tokens
from dmoe.moe.placement import HostConstant
from dmoe.moe.routers.learned import LearnedRouter, combine_weights, project, sort_experts
from dmoe.moe.routing import Routing, TokenContext


class BudgetRouter(LearnedRouter):
    def __init__(
        self, config: RouterConfig, dim: int, num_experts: int, top_k: int, layer: int = 0
    ) -> None:
        super().__init__(config, dim, num_experts, top_k, layer)
        self.work = HostConstant([1] * num_experts)

    def set_expert_costs(self, work: Sequence[int]) -> None:
        assert len(work) == self.num_experts, f"{len(work)} prices for {self.num_experts} experts"
        self.work = HostConstant(work)

    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        logit_TE = self.of_sequences(self.router_input(x_TD, context), context)
        score_TE = logit_TE.softmax(-1)
        expert_TK = sort_experts(score_TE.detach() + self.bias_E)[:, : self.top_k]
        enough_TK = score_TE.detach().gather(1, expert_TK) > self.config.min_weight
        budget = self.config.budget if context.budget is None else context.budget
        made_TK = affordable(
            enough_TK, self.work.on(x_TD.device)[expert_TK], allowance(budget, self.work.values)
        )
        expert_TK, made_TK = taken_first(expert_TK, made_TK)
        weight_TK = combine_weights(logit_TE, score_TE, expert_TK, self.config, made_TK)
        keep_TK = made_TK if context.valid_T is None else made_TK & context.valid_T.unsqueeze(1)
        return Routing(
            expert_TK, weight_TK, score_TE, logit_TE, scale=self.config.scale, keep_TK=keep_TK
        )

    def of_sequences(self, x_TD: Tensor, context: TokenContext) -> Tensor:
        """Logits [T, E] of each token, or of the mean over its sequence."""
        if self.config.per == "token":
            return project(x_TD, self.weight)
        tokens, count = x_TD.shape[0], context.sequences
        logit_BE = project(mean_over_tokens(x_TD, context.valid_T, count), self.weight)
        return (
            logit_BE.unsqueeze(1)
            .expand(count, tokens // max(1, count), self.num_experts)
            .reshape(tokens, self.num_experts)
        )


def allowance(budget: float, work: Sequence[int]) -> int:
    """Multiply-adds that a budget buys."""
    return int(budget * sum(work) * (1 + 1e-9))


def affordable(enough_TK: Tensor, work_TK: Tensor, budget: int) -> Tensor:
    """bool [T, K]: of the choices that are heavy `enough`, in order, those whose work fits what those taken before have left."""
    left_T = torch.full_like(work_TK[:, 0], budget)
    made = []
    for enough_T, work_T in zip(enough_TK.unbind(1), work_TK.unbind(1), strict=True):
        made.append(enough_T & (work_T <= left_T))
        left_T = left_T - work_T * made[-1]
    return torch.stack(made, 1)


def taken_first(expert_TK: Tensor, made_TK: Tensor) -> tuple[Tensor, Tensor]:
    """The same choices, those that were made before those passed over: a token's first choice, for whom an expert with a capacity
    serves first, is the first that it could afford."""
    order_TK = made_TK.sort(dim=1, descending=True, stable=True).indices
    return expert_TK.gather(1, order_TK), made_TK.gather(1, order_TK)


def budget_reference(
    probabilities: Sequence[float],
    bias: Sequence[float],
    work: Sequence[int],
    budget: float,
    min_weight: float,
    top_k: int,
) -> list[int]:
    """One token's experts, asked one after the other. For tests."""
    order = sorted(range(len(probabilities)), key=lambda e: (-(probabilities[e] + bias[e]), e))
    taken: list[int] = []
    for e in order[:top_k]:
        spent = sum(work[other] for other in taken) + work[e]
        if probabilities[e] > min_weight and spent <= budget * sum(work) * (1 + 1e-9):
            taken.append(e)
    return taken
