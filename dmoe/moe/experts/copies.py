"""The experts of a rank together with its copies of other ranks' experts.

Letters: R rows, D input width, M output width, e local experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dmoe.moe.interfaces import RowCounts, RowsWithCopies, TokensPerExpert

Weights = Mapping[str, Tensor]
"""Stacks of the experts by name, each [e, ...]."""


def compute_experts(
    function: Callable[[Weights, Tensor, TokensPerExpert], Tensor],
    weights: Weights,
    rows_RD: Tensor,
    row_counts: RowCounts,
) -> Tensor:
    """Compute rows of experts, and of the copies if there are any, [R, M].

    Args:
        function: computes rows grouped by expert with the stacks of these experts.
        weights: stacks of the local experts, in the rows' dtype.
        rows_RD: rows grouped by local expert, those of copies last.
        row_counts: of the dispatcher.
    """
    if not isinstance(row_counts, RowsWithCopies):
        return function(weights, rows_RD, row_counts)
    own, copied = row_counts.send(list(weights.values()))
    first = function(
        dict(zip(weights, own, strict=True)), rows_RD[: row_counts.num_own], row_counts.own_e
    )
    if not copied:
        return first
    last = function(
        dict(zip(weights, copied, strict=True)), rows_RD[row_counts.num_own :], row_counts.copied_n
    )
    return torch.cat([first, last])
