"""References of the adapter banks and of fixed and per-sequence routing: one row or token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmoe.modular.banks.base import AdapterBank


def bank_reference(bank: AdapterBank, rows_RD: Tensor, tokens_per_module: Tensor) -> Tensor:
    """Compute the bank's forward one row at a time, [R, W]."""
    module_R = torch.arange(len(tokens_per_module)).repeat_interleave(tokens_per_module).tolist()
    rows = [bank.reference(row_D, module) for row_D, module in zip(rows_RD, module_R, strict=True)]
    return torch.stack(rows) if rows else rows_RD.new_zeros(0, bank.width)


def sequence_mean_reference(
    x_TD: Tensor, valid_T: Tensor | None, sequences: int, first: int | None = None
) -> list[list[float]]:
    """Average each sequence's valid tokens (the `first` of them), one token at a time."""
    each = len(x_TD) // sequences
    means = []
    for b in range(sequences):
        tokens = [
            t for t in range(b * each, (b + 1) * each) if valid_T is None or bool(valid_T[t])
        ][:first]
        totals = [sum(float(x_TD[t, d]) for t in tokens) for d in range(x_TD.shape[1])]
        means.append([total / max(1, len(tokens)) for total in totals])
    return means


def constant_reference(weights: Sequence[float]) -> tuple[list[int], list[float]]:
    """Return one token's modules and weights."""
    return list(range(len(weights))), list(weights)


def table_reference(
    rows: Sequence[Sequence[int]], label: int, weight: float
) -> tuple[list[int], list[float]]:
    """Return one token's modules and weights."""
    return list(rows[label]), [weight] * len(rows[label])
