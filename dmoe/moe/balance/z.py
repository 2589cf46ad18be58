"""The router z-loss: logits should stay small, where float32's softmax is accurate.

    loss = mean over the unit's tokens of  logsumexp(logits)^2            (Zoph et al. 2022, ST-MoE, eq. 5)

Letters: T tokens, E experts, U units.
"""

from __future__ import annotations

import math

from torch import Tensor

from dmoe.moe.balance.units import mean_over_tokens

__all__ = ["z_loss", "z_reference"]


def z_loss(logit_TE: Tensor, valid_T: Tensor | None, units: int) -> Tensor:
    """[U]: the loss of each unit. No collective, no host sync."""
    return mean_over_tokens(logit_TE.logsumexp(-1, keepdim=True).square(), valid_T, units).squeeze(-1)


def z_reference(logit_TE: Tensor, tokens: list[int]) -> float:
    """The loss of one unit, the real tokens given, by loops. For tests."""
    return sum(math.log(sum(math.exp(logit) for logit in logit_TE[t].tolist())) ** 2 for t in tokens) / max(1, len(tokens))
