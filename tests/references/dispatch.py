"""Permutations one row, token and choice at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.moe.dispatch import Permutation


def permute_reference(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """Compute `permute` one row at a time."""
    filled = (
        [True] * len(permutation.assignment_R)
        if permutation.filled_R is None
        else permutation.filled_R.tolist()
    )
    rows = [
        x_TD[t] if full else torch.zeros_like(x_TD[0])
        for t, full in zip(permutation.token_R.tolist(), filled, strict=True)
    ]
    return torch.stack(rows) if rows else x_TD[:0]


def unpermute_reference(rows_RD: Tensor, weight_TK: Tensor, permutation: Permutation) -> Tensor:
    """Compute `unpermute` one token and choice at a time."""
    tokens = []
    for t, rows in enumerate(permutation.row_TK.tolist()):
        total = rows_RD.new_zeros(rows_RD.shape[1])
        for k, row in enumerate(rows):
            if permutation.keep_TK is None or bool(permutation.keep_TK[t, k]):
                total = total + weight_TK[t, k] * rows_RD[row]
        tokens.append(total)
    return torch.stack(tokens) if tokens else rows_RD.new_zeros(0, rows_RD.shape[1])
