"""The learned top-k router: Switch (Fedus et al. 2021), Mixtral, OLMoE, Qwen (softmax); DeepSeek-V3 without groups (sigmoid).

    score = softmax|sigmoid(x W^T)        experts = the K largest of score + bias        weights = their scores

Renormalised, scaled and biased as `learned.py` says, and with its costs; its reference is `top_k_reference` there.

Letters: T tokens, D width, E experts, K experts a token.

Group-limited routing (DeepSeek-V3, section 2.1.2; `noaux_tc`): a token's experts come from a few groups of neighbours.

    s' = score + bias                           group g = experts g*E/G .. (g+1)*E/G - 1
    S_g = sum of the two largest s' in g        eligible = the experts of the `topk_groups` groups with the largest S_g
    chosen = the K largest s' among the eligible;   weights = their scores without the bias, renormalised, scaled

Experts of one group usually live on one node, so the number of groups bounds the nodes a token travels to. Ties between groups go to
the lower group. A group of a single expert has its s' for S_g. An expert outside is no spare either.

Cost beside `learned.py`: a top-2 of every group and a sort of G numbers a token.

Letters: T tokens, D width, E experts, K experts a token, G groups of n = E/G experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmoe.moe.routers.learned import (
    LearnedRouter,
    gate_scores,
    top_k_stable,
)
from dmoe.moe.routing import Routing, TokenContext


class TopKRouter(LearnedRouter):
    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        logit_TE = self.logits(x_TD, context)
        return self.route(logit_TE, gate_scores(logit_TE, self.config), context)


class GroupLimitedRouter(LearnedRouter):
    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        logit_TE = self.logits(x_TD, context)
        score_TE = gate_scores(logit_TE, self.config)
        eligible_TE = eligible(
            score_TE.detach() + self.bias_E, self.config.groups, self.config.topk_groups
        )
        return self.route(logit_TE, score_TE, context, eligible_TE=eligible_TE)


def eligible(biased_TE: Tensor, groups: int, topk_groups: int) -> Tensor:
    """bool [T, E]: the experts of each token's best `topk_groups` groups."""
    tokens, num_experts = biased_TE.shape
    size = num_experts // groups
    group_score_TG = biased_TE.view(tokens, groups, size).topk(min(2, size), dim=-1).values.sum(-1)
    best_TB = top_k_stable(group_score_TG, topk_groups)
    inside_TG = torch.zeros_like(group_score_TG, dtype=torch.bool).scatter(1, best_TB, True)
    return inside_TG.repeat_interleave(size, dim=1, output_size=num_experts)


def eligible_reference(biased: Sequence[float], groups: int, topk_groups: int) -> list[int]:
    """One token's eligible experts, group by group. For tests."""
    size = len(biased) // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    scores = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in members]
    best = sorted(range(groups), key=lambda g: (-scores[g], g))[:topk_groups]
    return [e for g in sorted(best) for e in members[g]]
