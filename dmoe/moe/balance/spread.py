"""Two losses on how unequal the experts' scores are, whatever was chosen.

    importance = CV^2 over experts of  sum_t s_te      (Shazeer et al. 2017, eq. 6-7, with CV^2 = population variance / mean^2)
    usage_std  = population standard deviation over experts of  mean_t (s_te / sum_e s_te)

Both are 0 when every expert has the same total. s are the router's scores over all experts, as they are for importance (a common
factor cancels in CV), normalised to sum 1 a token for usage. No collective, no host sync.

Letters: T tokens, E experts, U units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmoe.moe.balance.units import mean_over_tokens, normalized, squared_variation, sum_over_tokens

__all__ = ["importance_loss", "importance_reference", "squared_variation_reference", "usage_std_loss", "usage_std_reference"]


def importance_loss(score_TE: Tensor, valid_T: Tensor | None, units: int) -> Tensor:
    """[U]: the loss of each unit."""
    return squared_variation(sum_over_tokens(score_TE, valid_T, units))


def usage_std_loss(score_TE: Tensor, valid_T: Tensor | None, units: int) -> Tensor:
    """[U]: the loss of each unit.

    The square root's slope is infinite at perfect balance; the norm's backward takes 0 there, the middle of its subgradients.
    """
    mean_UE = mean_over_tokens(normalized(score_TE), valid_T, units)
    away_UE = mean_UE - mean_UE.mean(-1, keepdim=True)
    std_U: Tensor = torch.linalg.vector_norm(away_UE, dim=-1) / math.sqrt(score_TE.shape[1])
    return std_U


def importance_reference(score_TE: Tensor, tokens: list[int]) -> float:
    """The importance loss of one unit, the real tokens given, by loops. For tests."""
    return squared_variation_reference([sum(float(score_TE[t, e]) for t in tokens) for e in range(score_TE.shape[1])])


def squared_variation_reference(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2 if mean else 0.0


def usage_std_reference(score_TE: Tensor, tokens: list[int]) -> float:
    """The usage_std loss of one unit, the real tokens given, by loops. For tests."""
    experts = range(score_TE.shape[1])
    usage = [sum(float(score_TE[t, e] / score_TE[t].sum()) for t in tokens) / max(1, len(tokens)) for e in experts]
    mean = sum(usage) / len(usage)
    return math.sqrt(sum((value - mean) ** 2 for value in usage) / len(usage))
