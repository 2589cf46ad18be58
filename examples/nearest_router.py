"""A router of your own: a token goes to the experts whose vector is nearest.

    dmoe verify moe.router.kind=examples/nearest_router.py:Nearest moe.router.options.power=2
    dmoe train --ranks 2 moe.router.kind=examples/nearest_router.py:Nearest train.steps=100

score = softmax(-|x - w_e|^power). The K largest of score + bias are chosen; their scores, divided
by their sum, are the weights. `LearnedRouter` brings the matrix, the bias of loss-free balancing,
and `route`, which chooses.

Letters: T tokens, D width, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.config.schema import RouterConfig
from dmoe.moe.routers.base import LearnedRouter, valid_choices
from dmoe.moe.routing import ONE_SEQUENCE, BatchShape, Routing, TokenContext


class Nearest(LearnedRouter):
    """Chooses the experts whose row of the matrix is nearest to the token."""

    def __init__(
        self,
        config: RouterConfig,
        dim: int,
        num_experts: int,
        top_k: int,
        layer: int = 0,
        *,
        power: float = 1.0,
    ) -> None:
        super().__init__(config, dim, num_experts, top_k, layer)
        self.power = power

    def forward(
        self, x_TD: Tensor, context: TokenContext, shape: BatchShape = ONE_SEQUENCE
    ) -> Routing:
        x_TD = self.router_input(x_TD, context, shape)
        squared_TE = (x_TD[:, None] - self.weight).square().sum(-1)
        logit_TE = -((squared_TE + 1e-12) ** (self.power / 2))
        return self.route(logit_TE, logit_TE.softmax(-1), context, shape)

    def reference(self, x_TD: Tensor, context: TokenContext, shape: BatchShape) -> Routing:
        """The same, one token and one expert at a time: `dmoe verify` compares with it."""
        logits, scores, experts, weights = [], [], [], []
        for x_D in x_TD:
            distances = [torch.sqrt(((x_D - w_D) ** 2).sum() + 1e-12) for w_D in self.weight]
            logit_E = torch.stack([-(distance**self.power) for distance in distances])
            score_E = torch.exp(logit_E) / torch.exp(logit_E).sum()
            biased = (score_E + self.bias_E).tolist()
            chosen = sorted(range(self.num_experts), key=lambda e: (-biased[e], e))[: self.top_k]
            logits.append(logit_E)
            scores.append(score_E)
            experts.append(chosen)
            weights.append(score_E[chosen] / score_E[chosen].sum())
        expert_TK = torch.tensor(experts)
        return Routing(
            expert_TK,
            torch.stack(weights),
            torch.stack(scores),
            torch.stack(logits),
            selected_TK=valid_choices(expert_TK, context),
        )
