"""Fixed routing: the experts follow from a label that comes with the batch (task, language, domain; as in DEMix, Gururangan 2022).

    experts of a token = (label * K + k) mod E,  k = 0 .. K-1;      weights 1/K, scaled

So with E = K * labels every label has K experts of its own. Nothing is learned and nothing is random; the auxiliary losses are
constants without a gradient (see `unlearned.py`). Cost: K integers a token.

Letters: T tokens, D width, E experts, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.moe.routers.base import RouterModule, per_token_input
from dmoe.moe.routers.unlearned import equal_weights
from dmoe.moe.routing import Routing, TokenContext

__all__ = ["FixedRouter", "fixed_reference"]


class FixedRouter(RouterModule):
    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        """Raises ValueError without `context.label_T`, int64 [T] of non-negative labels."""
        label_T = per_token_input(context.label_T, x_TD, "fixed", "label_T", "label (task, language or domain)")
        choice_K = torch.arange(self.top_k, device=label_T.device)
        expert_TK = (label_T.unsqueeze(1) * self.top_k + choice_K) % self.num_experts
        return equal_weights(expert_TK, x_TD, self.num_experts, self.config.scale, context)


def fixed_reference(label: int, top_k: int, num_experts: int) -> list[int]:
    """For tests."""
    return [(label * top_k + k) % num_experts for k in range(top_k)]
