"""Expert choice routing (Zhou et al. 2022): experts choose tokens, so the load is perfectly balanced by construction.

    S = softmax(x W^T) over the experts
    expert e takes the C tokens of each group with the largest S[:, e], with weight S[t, e], scaled
    C = slots of one (group, expert): K * T_g / E times `capacity.factor` (1 where there is none), so a token has K experts on average

A token may have none or all. Ties go to the earlier token; padding is never taken. As a `Routing` a token has all E experts in a
row, and `keep_TK` says who took it. There is no bias: nobody can be overloaded.

Whether a token is taken depends on the tokens after it in its sequence: in a causal language model this leaks the future, in training
and in evaluation, and a model so trained cannot be sampled from faithfully. Hence `allow_future_leak`.

Cost: a sort of the tokens for each expert, and T*E instead of T*K assignments to sort by expert. No collective, no host sync.

Letters: T tokens, D width, E experts, K experts a token on average, G groups of Tg tokens, C slots of one (group, expert).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.moe.capacity import expert_capacity
from dmoe.moe.expert_queue import priority_score
from dmoe.moe.routers.learned import LearnedRouter
from dmoe.moe.routing import Routing, TokenContext


class ExpertChoiceRouter(LearnedRouter):
    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        logit_TE = self.logits(x_TD, context)
        score_TE = logit_TE.softmax(-1)
        tokens, groups = x_TD.shape[0], max(1, context.groups)
        capacity = context.capacity
        if capacity is None:
            capacity = expert_capacity(1.0, tokens // groups, self.top_k, self.num_experts, 1)
        return Routing(
            torch.arange(self.num_experts, device=x_TD.device).repeat(tokens, 1),
            score_TE * self.config.scale,
            score_TE,
            logit_TE,
            scale=self.config.scale,
            keep_TK=taken_tokens(priority_score(score_TE), context.valid_T, groups, capacity),
        )


def taken_tokens(score_TE: Tensor, valid_T: Tensor | None, groups: int, capacity: int) -> Tensor:
    """bool [T, E]: whether the expert takes the token."""
    tokens, num_experts = score_TE.shape
    if valid_T is not None:
        score_TE = score_TE.masked_fill(
            ~valid_T.unsqueeze(1), -1.0
        )  # behind every real token, whose scores are not negative
    score_GTE = score_TE.view(groups, tokens // groups, num_experts)
    best_GCE = score_GTE.sort(dim=1, descending=True, stable=True).indices[:, :capacity]
    taken_TE = (
        torch.zeros_like(score_GTE, dtype=torch.bool)
        .scatter(1, best_GCE, True)
        .view(tokens, num_experts)
    )
    return taken_TE if valid_T is None else taken_TE & valid_T.unsqueeze(1)


def expert_choice_reference(
    scores: list[list[float]], valid: list[bool], groups: int, capacity: int
) -> list[tuple[int, int]]:
    """(token, expert) pairs, expert by expert and group by group. For tests."""
    per_group = len(scores) // groups
    pairs = []
    for g in range(groups):
        for e in range(len(scores[0]) if scores else 0):
            real = [t for t in range(g * per_group, (g + 1) * per_group) if valid[t]]
            pairs += [(t, e) for t in sorted(real, key=lambda t: (-scores[t][e], t))[:capacity]]
    return sorted(pairs)
