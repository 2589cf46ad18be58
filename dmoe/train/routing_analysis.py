"""What the experts have specialised in, from the decisions of an evaluation: it reads the same held-out text every time.

Three questions, each a layer: which experts are chosen together, which domains an expert serves, and how many tokens have changed their
experts since the last evaluation. The last is asked of the first batch only, whose decisions are kept until the next evaluation: a bit
for each token and expert. Decisions are those before any drop; padding decides nothing.

Letters: L MoE layers, T tokens, E experts, M domains.

Do hard tokens take more experts? From an evaluation, for routers in which a token's scores decide how many it takes.

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
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from dmoe.distributed.gradients import all_reduce_sum
from dmoe.moe.metrics import LayerStats
from dmoe.train.engine import Engine

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

    def update(
        self, stats: Sequence[LayerStats], label_T: Tensor, before: Sequence[RoutingSnapshot]
    ) -> list[RoutingSnapshot]:
        """`before`, empty at the first batch, and the decisions of this batch with it. No collective, no host read."""
        looks = [self._look(layer, label_T) for layer in stats]
        if not before:
            return looks
        return [
            RoutingSnapshot(
                a.chosen_TE,
                a.pair_EE + b.pair_EE,
                a.domain_ME + b.domain_ME,
                a.first_ME + b.first_ME,
            )
            for a, b in zip(before, looks, strict=True)
        ]

    def report(self, looks: Sequence[RoutingSnapshot]) -> list[dict[str, Any]]:
        """The `layers` of an `eval` line. Collective: one reduction of L * (E^2 + 2 M E + 2) numbers, and one host read."""
        if not looks:
            return []
        shares = []
        for layer, look in enumerate(looks):
            old_TE = self.previous[layer] if self.previous else look.chosen_TE
            tokens = torch.stack(
                [(look.chosen_TE | old_TE).any(-1).sum(), (look.chosen_TE != old_TE).any(-1).sum()]
            )
            shares += [
                look.pair_EE.flatten(),
                look.domain_ME.flatten(),
                look.first_ME.flatten(),
                tokens.double(),
            ]
        known, (domains, experts) = bool(self.previous), looks[0].domain_ME.shape
        self.previous = [look.chosen_TE for look in looks]
        numbers = iter(all_reduce_sum(torch.cat(shares), self.engine.mesh).tolist())
        lines = []
        for layer in range(len(looks)):
            pairs, served, first = (
                [[int(count) for count in islice(numbers, experts)] for _ in range(rows)]
                for rows in (experts, domains, domains)
            )
            tokens_seen, changed = islice(numbers, 2)
            lines.append(
                self._line(
                    layer, pairs, served, first, changed / max(1, tokens_seen) if known else None
                )
            )
        return lines

    def _look(self, layer: LayerStats, label_T: Tensor) -> RoutingSnapshot:
        chosen_TE, first_TE = (
            layer.observed["chosen_TE"].double(),
            layer.observed["first_TE"].double(),
        )
        label_T = label_T.repeat_interleave(
            len(chosen_TE) // len(label_T)
        )  # a layer may see several parts of a sample
        none_ME = chosen_TE.new_zeros(len(self.domains), chosen_TE.shape[1])
        return RoutingSnapshot(
            layer.observed["chosen_TE"],
            chosen_TE.t() @ chosen_TE,
            none_ME.index_add(0, label_T, chosen_TE),
            none_ME.index_add(0, label_T, first_TE),
        )

    def _line(
        self,
        layer: int,
        pairs: list[list[int]],
        served: list[list[int]],
        first: list[list[int]],
        changed: float | None,
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


VARYING = ("adaptive", "budget")
"""Routers in which a token's own scores decide how many experts it takes."""
SUMS = 3  # tokens, their nats, and the squares of these


class ComputeVsLoss:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        router, most = engine.config.moe.router.kind, engine.config.moe.top_k
        self.rows = most + 1 if router in VARYING else 0
        """Of a layer's sums; none where every token takes as many."""

    def update(
        self,
        stats: Sequence[LayerStats],
        nats_T: Tensor,
        valid_T: Tensor,
        before: Sequence[Tensor] = (),
    ) -> list[Tensor]:
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
        return [
            _line(layer)
            for layer in all_reduce_sum(torch.stack(list(sums)), self.engine.mesh).tolist()
        ]

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
