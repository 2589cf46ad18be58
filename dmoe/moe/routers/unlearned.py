"""What routers without parameters return: K experts of equal weight, and scores that make the statistics come out right.

`score` is 1/K for the chosen and 0 elsewhere, so P_e = f_e and the Switch loss E * sum_e f_e P_e becomes E * sum_e f_e^2: a measure
of the imbalance, 1 at perfect balance, with no gradient to send. All logits are -ln E, so that logsumexp, which the z-loss would
shrink, is already 0. A balance loss of such a router is therefore reported and trains nothing.

Letters: T tokens, D width, E experts, K experts a token.
"""

from __future__ import annotations

import math

from torch import Tensor

from dmoe.moe.routers.base import valid_choices, router_dtype
from dmoe.moe.routing import Routing, TokenContext

__all__ = ["equal_weights"]


def equal_weights(expert_TK: Tensor, x_TD: Tensor, num_experts: int, scale: float, context: TokenContext) -> Routing:
    """The routing that sends each token to its K distinct experts with weight `scale / K`. No host sync."""
    tokens, top_k = expert_TK.shape
    zero_TE = x_TD.new_zeros(tokens, num_experts, dtype=router_dtype(x_TD))
    return Routing(
        expert_TK=expert_TK,
        weight_TK=zero_TE.new_full((tokens, top_k), scale / top_k),
        score_TE=zero_TE.scatter(1, expert_TK, 1 / top_k),
        logit_TE=zero_TE - math.log(num_experts),
        scale=scale,
        keep_TK=valid_choices(expert_TK, context),
    )
