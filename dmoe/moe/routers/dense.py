"""Soft routing: the dense mixture of Jacobs et al. 1991. Every token visits every expert.

    y = sum over all e of softmax(x W^T)_e * expert_e(x)

K = E, so `moe.top_k` must say so. The weights are the scores, scaled; they sum to 1 without renormalisation. There is no choice, so no
bias and nothing to balance; experts are listed by id, not by preference. The yardstick that sparse routing is measured against.

Cost: E/K times the experts' work of a top-k router.

Letters: T tokens, D width, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dmoe.moe.routers.base import valid_choices
from dmoe.moe.routers.learned import LearnedRouter
from dmoe.moe.routing import Routing, TokenContext


class DenseRouter(LearnedRouter):
    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        logit_TE = self.logits(x_TD, context)
        score_TE = logit_TE.softmax(-1)
        expert_TE = torch.arange(self.num_experts, device=x_TD.device).repeat(x_TD.shape[0], 1)
        return Routing(
            expert_TE,
            score_TE * self.config.scale,
            score_TE,
            logit_TE,
            scale=self.config.scale,
            keep_TK=valid_choices(expert_TE, context),
        )


def soft_reference(logits: Sequence[float]) -> list[float]:
    """One token's weights, by expert. For tests."""
    exponentials = [math.exp(logit) for logit in logits]
    return [value / sum(exponentials) for value in exponentials]
