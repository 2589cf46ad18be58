"""Adaptive k, top-p routing (Huang et al. 2024, "Harder Tasks Need More Experts"): unsure tokens take more experts.

    p = softmax(x W^T), experts in descending order of p + bias
    k_t = the smallest k in [k_min, k_max] with  p_1 + ... + p_k >= top_p;   k_max = moe.top_k if the sum never gets there

`keep_TK` marks the k_t choices made; the others weigh nothing. Weights as configured, over the choices made.

`renormalize` needs k_min >= 2 (the config check refuses it otherwise): a token that is sure of one expert would have weight 1 whatever
the router says, so the loss could never tell it that it is wrong, and being sure would be a state that no token leaves. The paper
takes the probabilities as they are.

Cost beside `learned.py`: a sum over [T, K]. The rows an expert gets vary as ever; capacity counts moe.top_k choices a token.

Letters: T tokens, D width, E experts, K the most experts a token takes, S spare experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmoe.moe.routers.base import with_next_experts
from dmoe.moe.routers.learned import LearnedRouter, combine_weights, gate_scores, sort_experts
from dmoe.moe.routing import Routing, TokenContext


class AdaptiveRouter(LearnedRouter):
    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        logit_TE = self.logits(x_TD, context)
        score_TE = gate_scores(logit_TE, self.config)
        order_TE = sort_experts(score_TE.detach() + self.bias_E)
        expert_TK = order_TE[:, : self.top_k]
        made_TK = taken(
            score_TE.detach().gather(1, expert_TK), self.config.top_p, self.config.k_min
        )
        weight_TK = combine_weights(logit_TE, score_TE, expert_TK, self.config, made_TK)
        keep_TK = made_TK if context.valid_T is None else made_TK & context.valid_T.unsqueeze(1)
        routing = Routing(
            expert_TK, weight_TK, score_TE, logit_TE, scale=self.config.scale, keep_TK=keep_TK
        )
        if context.capacity is None:
            return routing
        # The next expert of a token that took k_t of its K is the one after the k_t-th, not after the K-th.
        spares = min(self.top_k, self.num_experts - self.config.k_min)
        position_TS = made_TK.sum(1, keepdim=True) + torch.arange(spares, device=made_TK.device)
        there_TS = position_TS < self.num_experts
        spare_TS = order_TE.gather(1, position_TS.clamp(max=self.num_experts - 1))
        return with_next_experts(routing, spare_TS, self.config, there_TS=there_TS, made_TK=made_TK)


def taken(probability_TK: Tensor, top_p: float, k_min: int) -> Tensor:
    """bool [T, K]: a choice is made if those before it did not reach `top_p`, or are fewer than `k_min`."""
    before_TK = probability_TK.cumsum(1).roll(1, 1)
    before_TK[:, 0] = 0.0
    fewer_K = torch.arange(probability_TK.shape[1], device=probability_TK.device) < k_min
    return (before_TK < top_p) | fewer_K


def adaptive_reference(
    probabilities: Sequence[float], bias: Sequence[float], top_p: float, k_min: int, k_max: int
) -> list[int]:
    """One token's experts, adding one at a time. For tests."""
    order = sorted(range(len(probabilities)), key=lambda e: (-(probabilities[e] + bias[e]), e))
    for k in range(k_min, k_max):
        if sum(probabilities[e] for e in order[:k]) >= top_p:
            return order[:k]
    return order[:k_max]
