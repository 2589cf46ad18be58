"""Expert choice routing (Zhou et al. 2022): experts select tokens, so the load is balanced.

    S = softmax(x W^T) over the experts
    expert e takes the C tokens of each group with the largest S[:, e], with weight S[t, e], scaled
    C = slots of one (group, expert): K * T_g / E times `capacity.factor` (1 without one), so K
        experts per token on average

A token may have none or all. Ties go to the earlier token; padding is never taken. As a `Routing`,
a token lists all E experts, and `selected_TK` marks those that take it. There is no bias: no expert
can be overloaded.

Whether a token is taken depends on the tokens after it in its sequence: in a causal language model
this leaks the future, in training and in evaluation, and such a model cannot be sampled from
faithfully. Hence `allow_future_leak`.

Cost: a sort of the tokens for each expert, and T*E instead of T*K assignments to sort by expert. No
collective, no host sync.

Letters: T tokens, D width, E experts, K experts per token on average, G groups of T_g tokens, C
slots of one (group, expert).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.moe.capacity import expert_capacity
from dmoe.moe.expert_queue import priority_score
from dmoe.moe.routers.base import LearnedRouter
from dmoe.moe.routing import ONE_SEQUENCE, BatchShape, Routing, TokenContext


class ExpertChoiceRouter(LearnedRouter):
    """Lets each expert select the tokens that score it highest."""

    def forward(
        self, x_TD: Tensor, context: TokenContext, shape: BatchShape = ONE_SEQUENCE
    ) -> Routing:
        logit_TE = self.logits(x_TD, context, shape)
        score_TE = logit_TE.softmax(-1)
        tokens, groups = x_TD.shape[0], max(1, shape.groups)
        capacity = shape.capacity
        if capacity is None:
            capacity = expert_capacity(1.0, tokens // groups, self.top_k, self.num_experts, 1)
        return Routing(
            torch.arange(self.num_experts, device=x_TD.device).repeat(tokens, 1),
            score_TE * self.config.scale,
            score_TE,
            logit_TE,
            scale=self.config.scale,
            selected_TK=taken_tokens(priority_score(score_TE), context.valid_T, groups, capacity),
        )


def taken_tokens(score_TE: Tensor, valid_T: Tensor | None, groups: int, capacity: int) -> Tensor:
    """Return which experts take each token, bool [T, E].

    Args:
        score_TE: non-negative scores.
        valid_T: bool, False for padding, or None.
        groups: number G of equal, contiguous groups of tokens.
        capacity: tokens C that an expert takes from each group.
    """
    tokens, num_experts = score_TE.shape
    if valid_T is not None:
        # behind every real token, whose scores are not negative
        score_TE = score_TE.masked_fill(~valid_T.unsqueeze(1), -1.0)
    score_GTE = score_TE.view(groups, tokens // groups, num_experts)
    best_GCE = score_GTE.sort(dim=1, descending=True, stable=True).indices[:, :capacity]
    taken_GTE = torch.zeros_like(score_GTE, dtype=torch.bool).scatter(1, best_GCE, True)
    taken_TE = taken_GTE.view(tokens, num_experts)
    return taken_TE if valid_T is None else taken_TE & valid_T.unsqueeze(1)
