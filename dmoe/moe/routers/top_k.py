"""The learned top-k router: Switch (Fedus et al. 2021), Mixtral, OLMoE, Qwen (softmax); DeepSeek-V3 without groups (sigmoid).

    score = softmax|sigmoid(x W^T)        experts = the K largest of score + bias        weights = their scores

Renormalised, scaled and biased as `learned.py` says, and with its costs; its reference is `top_k_reference` there.

Letters: T tokens, D width, E experts, K experts a token.
"""

from __future__ import annotations

from torch import Tensor

from dmoe.moe.routers.base import router_dtype
from dmoe.moe.routers.learned import LearnedRouter, choose, choose_reference, score, weigh
from dmoe.moe.routing import Routing, TokenContext

__all__ = ["TopKRouter", "choose", "choose_reference", "router_dtype", "score", "weigh"]


class TopKRouter(LearnedRouter):
    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        logit_TE = self.logits(x_TD, context)
        return self.decide(logit_TE, score(logit_TE, self.config), context)
