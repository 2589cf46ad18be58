"""Counting and averaging over units of tokens: what every auxiliary loss is made of.

Units are equal, contiguous runs of tokens. Padding (`valid_T` False, or `keep_TK` False for a choice) counts nowhere.

Letters: T tokens, E experts, K experts a token, U units, S = T/U tokens a unit, X anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.moe.expert_queue import count_per_expert
from dmoe.moe.routing import Routing


def choice_count(routing: Routing, units: int) -> Tensor:
    """int64 [U, E]: how many choices of each unit fell on each expert, before any drop. Integer atomics only: deterministic."""
    made_TK = torch.ones_like(routing.expert_TK) if routing.keep_TK is None else routing.keep_TK
    return count_per_expert(routing.expert_TK, made_TK, units, routing.score_TE.shape[1])


def normalized(score_TE: Tensor) -> Tensor:
    """Scores that sum to 1 over the experts: softmax already does, sigmoid does not."""
    return score_TE / (score_TE.sum(-1, keepdim=True) + 1e-20)


def fraction(count: Tensor) -> Tensor:
    """Counts as shares of their sum; all 0 where nothing was counted."""
    return count / count.sum(-1, keepdim=True).clamp(min=1)


def masked(value_TX: Tensor, valid_T: Tensor | None) -> Tensor:
    return value_TX if valid_T is None else value_TX.masked_fill(~valid_T.unsqueeze(1), 0.0)


def sum_over_tokens(value_TX: Tensor, valid_T: Tensor | None, units: int) -> Tensor:
    """[U, X]: the sum over each unit's real tokens. The sizes are spelled out: -1 has no meaning for zero tokens."""
    tokens, width = value_TX.shape
    return masked(value_TX, valid_T).view(units, tokens // max(1, units), width).sum(1)


def mean_over_tokens(value_TX: Tensor, valid_T: Tensor | None, units: int) -> Tensor:
    """[U, X]: the mean over each unit's real tokens; 0 for a unit of padding only."""
    tokens = value_TX.shape[0] // max(1, units)
    sum_UX = sum_over_tokens(value_TX, valid_T, units)
    if valid_T is None:
        return sum_UX / max(1, tokens)
    return sum_UX / valid_T.view(units, tokens).sum(1, keepdim=True).clamp(min=1)


def real_tokens(like: Tensor, valid_T: Tensor | None) -> Tensor:
    """int64 [1]: tokens that are no padding. Filled on the device: copying a number there would make the host wait."""
    if valid_T is None:
        return torch.full((1,), like.shape[0], dtype=torch.int64, device=like.device)
    return valid_T.sum().view(1)


def squared_variation(value_UE: Tensor) -> Tensor:
    """[U]: squared coefficient of variation over the experts, `variance / mean^2` (population variance); 0 where all are 0."""
    mean_U1 = value_UE.mean(-1, keepdim=True)
    return (value_UE - mean_U1).square().mean(-1) / (mean_U1.squeeze(-1).square() + 1e-20)
