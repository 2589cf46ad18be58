"""Adaptive k, top-p routing: unsure tokens take more experts.

Huang et al. 2024, "Harder Tasks Need More Experts":

    p = softmax(x W^T), experts in descending order of p + bias
    k_t = the smallest k in [k_min, k_max] with  p_1 + ... + p_k >= top_p,  k_max = moe.top_k if
          the sum never gets there

`selected_TK` marks the k_t selected experts; the others have weight 0. Weights as configured, over
the selected.

`renormalize` needs k_min >= 2 (the config check refuses it otherwise): a token that is sure of one
expert would have weight 1 whatever the router says, so the loss could not correct the router, and
no token would leave that state. The paper uses the probabilities as they are.

Cost in addition to `base.py`: a sum over [T, K]. The rows per expert vary; capacity counts
moe.top_k experts per token.

Letters: T tokens, D width, E experts, K the most experts per token, S next experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.moe.routers.base import (
    LearnedRouter,
    combine_weights,
    gate_scores,
    sort_experts,
    with_next_experts,
)
from dmoe.moe.routing import ONE_SEQUENCE, BatchShape, Routing, TokenContext


class AdaptiveRouter(LearnedRouter):
    """Selects experts until their probabilities reach `top_p`."""

    def forward(
        self, x_TD: Tensor, context: TokenContext, shape: BatchShape = ONE_SEQUENCE
    ) -> Routing:
        logit_TE = self.logits(x_TD, context, shape)
        return self.select(logit_TE, gate_scores(logit_TE, self.config), context, shape)

    def select(
        self, logit_TE: Tensor, score_TE: Tensor, context: TokenContext, shape: BatchShape
    ) -> Routing:
        order_TE = sort_experts(score_TE.detach() + self.bias_E)
        expert_TK = order_TE[:, : self.top_k]
        taken_TK = until_top_p(
            score_TE.detach().gather(1, expert_TK), self.config.top_p, self.config.k_min
        )
        routing = Routing(
            expert_TK,
            combine_weights(logit_TE, score_TE, expert_TK, self.config, taken_TK),
            score_TE,
            logit_TE,
            scale=self.config.scale,
            selected_TK=taken_TK
            if context.valid_T is None
            else taken_TK & context.valid_T.unsqueeze(1),
        )
        if shape.capacity is None:
            return routing
        # The next expert of a token with k_t of its K experts follows the k_t-th, not the K-th.
        count = min(self.top_k, self.num_experts - self.config.k_min)
        position_TS = taken_TK.sum(1, keepdim=True) + torch.arange(count, device=taken_TK.device)
        exists_TS = position_TS < self.num_experts
        next_TS = order_TE.gather(1, position_TS.clamp(max=self.num_experts - 1))
        return with_next_experts(
            routing, next_TS, self.config, exists_TS=exists_TS, selected_TK=taken_TK
        )


def until_top_p(probability_TK: Tensor, top_p: float, k_min: int) -> Tensor:
    """Select experts while those before them are below `top_p` or `k_min`; bool [T, K]."""
    # A product with a strict triangle of ones is the sum of those before. CUDA's `cumsum` of floats
    # is not deterministic, and torch refuses it under `train.deterministic`. In float64 the order
    # of the sum does not show in a float32 probability, and autocast leaves it alone.
    earlier_KK = probability_TK.new_ones(2 * probability_TK.shape[1:], dtype=torch.float64).triu(1)
    before_TK = (probability_TK.double() @ earlier_KK).to(probability_TK.dtype)
    below_min_K = torch.arange(probability_TK.shape[1], device=probability_TK.device) < k_min
    return (before_TK < top_p) | below_min_K
