"""Do hard tokens take more experts? From an evaluation, for routers in which a token's scores decide how many it takes.

For each layer and k = 0 .. K: n_k tokens took k experts (before any drop), and lost `mean_k` nats each. Their correlation (Pearson)
over all tokens, from the same sums, with l the loss of a token:

    r = (n * sum k l - sum k * sum l) / sqrt((n * sum k^2 - (sum k)^2) * (n * sum l^2 - (sum l)^2))

above 0 if tokens that take more experts are the harder ones. It says what goes together and not what causes it: a token that is hard
may take more experts, and one that takes fewer is computed with less. Padding takes part in neither.

Letters: L MoE layers, T tokens, E experts, K the most experts a token takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dmoe.distributed.gradients import all_sum
from dmoe.moe.stats import LayerStats
from dmoe.training.engine import Engine

__all__ = ["ComputeVsLoss", "correlation"]

VARYING = ("adaptive", "budget")
"""Routers in which a token's own scores decide how many experts it takes."""
SUMS = 3  # tokens, their nats, and the squares of these


class ComputeVsLoss:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        router, most = engine.config.moe.router.kind, engine.config.moe.top_k
        self.rows = most + 1 if router in VARYING else 0
        """Of a layer's sums; none where every token takes as many."""

    def update(self, stats: Sequence[LayerStats], nats_T: Tensor, valid_T: Tensor, before: Sequence[Tensor] = ()) -> list[Tensor]:
        """`before`, empty at the first batch, and this batch: float64 [K+1, 3] of each layer. No collective, no host read.

        nats_T: each token's loss; valid_T: bool, False for padding. The layers have been asked for `observation.decisions`.
        """
        found = [self._sums(layer, nats_T, valid_T) for layer in stats]
        return [old + new for old, new in zip(before, found, strict=True)] if before else found

    def report(self, sums: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Further keys of the `layers` of an `eval` line: `k_loss`, rows of [k, tokens, mean nats] that have tokens, and
        `k_loss_correlation` if both vary; nothing of a router that takes as many for every token.

        Collective for the others: one reduction of L * 3 * (K + 1) numbers, and one host read.
        """
        if not (sums and self.rows):
            return [{} for _ in sums]
        return [_line(layer) for layer in all_sum(torch.stack(list(sums)), self.engine.mesh).tolist()]

    def _sums(self, layer: LayerStats, nats_T: Tensor, valid_T: Tensor) -> Tensor:
        none = torch.zeros(self.rows, SUMS, dtype=torch.float64, device=nats_T.device)
        if not self.rows:
            return none
        taken_T = layer.observed["chosen_TE"].sum(-1)
        parts = len(taken_T) // len(nats_T)  # a layer may see several parts of a sample
        nats_T, valid_T = nats_T.double().repeat_interleave(parts), valid_T.repeat_interleave(parts)
        each_T3 = torch.stack([torch.ones_like(nats_T), nats_T, nats_T.square()], 1)
        return none.index_add(0, taken_T, each_T3 * valid_T.unsqueeze(1))


def _line(sums: Sequence[Sequence[float]]) -> dict[str, Any]:
    rows = [[k, int(tokens), nats / tokens] for k, (tokens, nats, _) in enumerate(sums) if tokens]
    found, line = correlation(sums), dict[str, Any](k_loss=rows)
    return line if found is None else line | {"k_loss_correlation": found}


def correlation(sums: Sequence[Sequence[float]]) -> float | None:
    """Of k, the row's number, with the loss; None where one of them is the same for all tokens."""
    tokens, nats, squares = (sum(row[i] for row in sums) for i in range(SUMS))
    first = sum(k * row[0] for k, row in enumerate(sums))
    second = sum(k * k * row[0] for k, row in enumerate(sums))
    both = sum(k * row[1] for k, row in enumerate(sums))
    spread_k, spread_l = tokens * second - first * first, tokens * squares - nats * nats
    if spread_k <= 0 or spread_l <= 1e-9 * nats * nats:  # of equal losses, rounding is left
        return None
    return (tokens * both - first * nats) / math.sqrt(spread_k * spread_l)
