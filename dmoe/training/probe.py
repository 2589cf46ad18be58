"""What the experts have specialised in, from the decisions of an evaluation: it reads the same held-out text every time.

Three questions, each a layer: which experts are chosen together, which domains an expert serves, and how many tokens have changed their
experts since the last evaluation. The last is asked of the first batch only, whose decisions are kept until the next evaluation: a bit
for each token and expert. Decisions are those before any drop; padding decides nothing.

Letters: L MoE layers, T tokens, E experts, M domains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from dmoe.distributed.gradients import all_sum
from dmoe.moe.stats import LayerStats
from dmoe.training.engine import Engine

__all__ = ["RoutingSnapshot", "RoutingProbe", "mutual_information"]

WITHOUT_A_FIRST = ("soft", "expert_choice")
"""Routers that list all experts of a token by id: the first of them means nothing."""
MOST_EXPERTS = 128
"""Above this the table of pairs is left out: with 60 layers it would be more than a million numbers on one line."""


@dataclass(frozen=True)
class RoutingSnapshot:
    """Decisions of one layer: those of the first batch, and sums over all batches of this rank (float64)."""

    chosen_TE: Tensor
    pair_EE: Tensor
    """Tokens that chose both experts; on the diagonal, that chose the expert."""
    domain_ME: Tensor
    """Choices of each domain's tokens."""
    first_ME: Tensor
    """Their first choices alone."""


class RoutingProbe:
    def __init__(self, engine: Engine, domains: Sequence[str]) -> None:
        self.engine, self.domains = engine, list(domains)
        self.previous: list[Tensor] = []
        """For each layer bool [T, E], of the last evaluation that this process finished."""

    def update(self, stats: Sequence[LayerStats], label_T: Tensor, before: Sequence[RoutingSnapshot]) -> list[RoutingSnapshot]:
        """`before`, empty at the first batch, and the decisions of this batch with it. No collective, no host read."""
        looks = [self._look(layer, label_T) for layer in stats]
        if not before:
            return looks
        return [
            RoutingSnapshot(a.chosen_TE, a.pair_EE + b.pair_EE, a.domain_ME + b.domain_ME, a.first_ME + b.first_ME)
            for a, b in zip(before, looks, strict=True)
        ]

    def report(self, looks: Sequence[RoutingSnapshot]) -> list[dict[str, Any]]:
        """The `layers` of an `eval` line. Collective: one reduction of L * (E^2 + 2 M E + 2) numbers, and one host read."""
        if not looks:
            return []
        shares = []
        for layer, look in enumerate(looks):
            old_TE = self.previous[layer] if self.previous else look.chosen_TE
            tokens = torch.stack([(look.chosen_TE | old_TE).any(-1).sum(), (look.chosen_TE != old_TE).any(-1).sum()])
            shares += [look.pair_EE.flatten(), look.domain_ME.flatten(), look.first_ME.flatten(), tokens.double()]
        known, (domains, experts) = bool(self.previous), looks[0].domain_ME.shape
        self.previous = [look.chosen_TE for look in looks]
        numbers = iter(all_sum(torch.cat(shares), self.engine.mesh).tolist())
        lines = []
        for layer in range(len(looks)):
            pairs, served, first = (
                [[int(count) for count in islice(numbers, experts)] for _ in range(rows)]
                for rows in (experts, domains, domains)
            )
            tokens_seen, changed = islice(numbers, 2)
            lines.append(self._line(layer, pairs, served, first, changed / max(1, tokens_seen) if known else None))
        return lines

    def _look(self, layer: LayerStats, label_T: Tensor) -> RoutingSnapshot:
        chosen_TE, first_TE = layer.observed["chosen_TE"].double(), layer.observed["first_TE"].double()
        label_T = label_T.repeat_interleave(len(chosen_TE) // len(label_T))  # a layer may see several parts of a sample
        none_ME = chosen_TE.new_zeros(len(self.domains), chosen_TE.shape[1])
        return RoutingSnapshot(
            layer.observed["chosen_TE"],
            chosen_TE.t() @ chosen_TE,
            none_ME.index_add(0, label_T, chosen_TE),
            none_ME.index_add(0, label_T, first_TE),
        )

    def _line(
        self, layer: int, pairs: list[list[int]], served: list[list[int]], first: list[list[int]], changed: float | None
    ) -> dict[str, Any]:
        line: dict[str, Any] = {"layer": layer}
        if changed is not None:
            line["stability"] = changed
        if len(pairs) <= MOST_EXPERTS:
            line["co_selection"] = pairs
        if len(self.domains) > 1:
            reached = [domain for domain, row in enumerate(served) if any(row)]
            line["domains"] = {self.domains[domain]: served[domain] for domain in reached}
            if len(reached) > 1 and self.engine.config.moe.router.kind not in WITHOUT_A_FIRST:
                line["mutual_information"] = mutual_information(first)
        return line


def mutual_information(count_ME: Sequence[Sequence[int]]) -> float:
    """Bits that the row of a random count tells about its column: `sum_me p(m, e) log2( p(m, e) / (p(m) p(e)) )`; 0 of nothing."""
    total = sum(map(sum, count_ME))
    by_column = [sum(column) for column in zip(*count_ME, strict=True)]
    bits = 0.0
    for row in count_ME:
        for count, column in zip(row, by_column, strict=True):
            if count:
                bits += count / total * math.log2(count * total / (sum(row) * column))
    return max(0.0, bits)  # independent counts can round below it
