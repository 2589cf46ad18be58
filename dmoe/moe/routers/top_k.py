"""The learned top-k router: Switch (Fedus et al. 2021), Mixtral, OLMoE, Qwen (softmax); DeepSeek-V3 without groups (sigmoid).

    score = softmax|sigmoid(x W^T)        experts = the K largest of score + bias        weights = their scores

Renormalised, scaled and biased as `learned.py` says, and with its costs; its reference is `top_k_reference` there.

Letters: T tokens, D width, E experts, K experts a token.
"""

from __future__ import annotations

from torch import Tensor

from dmoe.moe.routers.base import router_dtype
from dmoe.moe.routers.learned import LearnedRouter, top_k_stable, top_k_stable_reference, gate_scores, combine_weights
from dmoe.moe.routing import Routing, TokenContext

__all__ = ["TopKRouter", "top_k_stable", "top_k_stable_reference", "router_dtype", "gate_scores", "combine_weights"]


class TopKRouter(LearnedRouter):
    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        logit_TE = self.logits(x_TD, context)
        return self.route(logit_TE, gate_scores(logit_TE, self.config), context)
