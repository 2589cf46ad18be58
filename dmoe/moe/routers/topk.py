"""Top-k routers: plain, group-limited, and dense (K = E).

Plain (Switch, Fedus et al. 2021; Mixtral, OLMoE, Qwen with softmax; DeepSeek-V3 without groups with
sigmoid):

    score   = softmax|sigmoid(x W^T)
    experts = the K largest of score + bias
    weights = their scores

renormalized, scaled and biased as `base.py` describes, and at its cost.

Group-limited (DeepSeek-V3, section 2.1.2; `noaux_tc`): a token's experts come from a few groups of
neighbours.

    s' = score + bias;   group g = experts g*E/G .. (g+1)*E/G - 1
    S_g      = sum of the two largest s' in g
    eligible = the experts of the `topk_groups` groups with the largest S_g
    selected = the K largest s' among the eligible
    weights  = their scores without the bias, renormalized, scaled

Experts of one group usually share a node, so the number of groups bounds the nodes that a token is
sent to. Ties between groups go to the lower group. A group of one expert has its s' as S_g.
Ineligible experts are no next experts either. Cost in addition to `base.py`: a top-2 of every group
and a sort of G values per token.

Dense (Jacobs et al. 1991), kind `soft`: every token visits every expert.

    y = sum over all e of softmax(x W^T)_e * expert_e(x)

`moe.top_k` must be E. The weights are the scores, scaled; they sum to 1 without renormalization.
There is no selection, so no bias and nothing to balance; experts are listed by id, not by
preference. The baseline for sparse routing. Cost: E/K times the experts' work of a top-k router.

Letters: T tokens, D width, E experts, K experts per token, G groups of n = E/G experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.moe.routers.base import LearnedRouter, gate_scores, top_k_stable, valid_choices
from dmoe.moe.routing import ONE_SEQUENCE, BatchShape, Routing, TokenContext


class TopKRouter(LearnedRouter):
    """Selects the K experts of largest score."""

    def forward(
        self, x_TD: Tensor, context: TokenContext, shape: BatchShape = ONE_SEQUENCE
    ) -> Routing:
        logit_TE = self.logits(x_TD, context, shape)
        return self.select(logit_TE, gate_scores(logit_TE, self.config), context, shape)


class GroupLimitedRouter(TopKRouter):
    """Selects the K experts of largest score within the token's best groups of experts."""

    def select(
        self, logit_TE: Tensor, score_TE: Tensor, context: TokenContext, shape: BatchShape
    ) -> Routing:
        eligible_TE = eligible(
            score_TE.detach() + self.bias_E, self.config.groups, self.config.topk_groups
        )
        return self.route(logit_TE, score_TE, context, shape, eligible_TE=eligible_TE)


def eligible(biased_TE: Tensor, groups: int, topk_groups: int) -> Tensor:
    """Return the experts of each token's best `topk_groups` groups, bool [T, E]."""
    tokens, num_experts = biased_TE.shape
    size = num_experts // groups
    group_score_TG = biased_TE.view(tokens, groups, size).topk(min(2, size), dim=-1).values.sum(-1)
    best_TB = top_k_stable(group_score_TG, topk_groups)
    is_best_TG = torch.zeros_like(group_score_TG, dtype=torch.bool).scatter(1, best_TB, True)
    return is_best_TG.repeat_interleave(size, dim=1, output_size=num_experts)


class DenseRouter(LearnedRouter):
    """Selects all experts, weighted by softmax scores."""

    def forward(
        self, x_TD: Tensor, context: TokenContext, shape: BatchShape = ONE_SEQUENCE
    ) -> Routing:
        logit_TE = self.logits(x_TD, context, shape)
        score_TE = logit_TE.softmax(-1)
        expert_TE = torch.arange(self.num_experts, device=x_TD.device).repeat(x_TD.shape[0], 1)
        return Routing(
            expert_TE,
            score_TE * self.config.scale,
            score_TE,
            logit_TE,
            scale=self.config.scale,
            selected_TK=valid_choices(expert_TE, context),
        )
