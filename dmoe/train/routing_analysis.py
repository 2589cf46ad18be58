"""Routing analysis of an evaluation, which reads the same held-out samples every time.

`RoutingProbe`: per layer which experts are selected together, which domains an expert serves, and
how many tokens have changed their experts since the last evaluation. The last is asked of the first
batch only, whose decisions are kept until the next evaluation, one bit per token and expert.

`ComputeVsLoss`: whether hard tokens take more experts, for routers of variable k. For each layer
and k = 0 .. K, n_k tokens took k experts and had a mean loss of l_k nats. Pearson's correlation
over all tokens, with l the loss of a token:

    r = (n sum(k l) - sum(k) sum(l)) / sqrt((n sum(k^2) - sum(k)^2) (n sum(l^2) - sum(l)^2))

It is above 0 if tokens with more experts are the harder ones. A correlation is no cause: a hard
token may take more experts, and a token with fewer experts is computed with less.

Decisions are those before any drop. Padding is left out.

Letters: L MoE layers, T tokens, E experts, K the most experts per token, M domains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from dmoe.config.router_kinds import router_spec
from dmoe.distributed.gradients import all_reduce_sum
from dmoe.moe.metrics import LayerStats
from dmoe.moe.routing import masked
from dmoe.train.engine import Engine

MAX_EXPERTS_OF_PAIR_TABLE = 128
"""No table of pairs above this: 60 layers would give more than a million numbers on one line."""
NUM_SUMS = 3  # tokens, their losses, the squares of these


@dataclass(frozen=True)
class RoutingSnapshot:
    """Decisions in one layer: of the first batch, and counts (float64) over this rank's batches."""

    chosen_TE: Tensor
    """bool: experts of each token of the first batch."""
    pair_count_EE: Tensor
    """Tokens that selected both experts; on the diagonal, that selected the expert."""
    domain_count_ME: Tensor
    """Assignments of each domain's tokens."""
    first_count_ME: Tensor
    """First choices of each domain's tokens."""


class RoutingProbe:
    """Collects and reports the decisions of evaluations; remembers those of the last one."""

    def __init__(self, engine: Engine, domains: Sequence[str]) -> None:
        self.engine, self.domains = engine, list(domains)
        self.previous: list[Tensor] = []
        """For each layer bool [T, E], of the last evaluation that this process finished."""

    def update(
        self, stats: Sequence[LayerStats], label_T: Tensor, before: Sequence[RoutingSnapshot]
    ) -> list[RoutingSnapshot]:
        """Add the decisions of one batch. No collective, no host read.

        Args:
            stats: of each MoE layer, with the metrics of `moe.metrics.decisions`.
            label_T: domain of each token.
            before: result of the last update; empty for the first batch.
        """
        snapshots = [self._snapshot(layer, label_T) for layer in stats]
        if not before:
            return snapshots
        return [
            RoutingSnapshot(
                old.chosen_TE,
                old.pair_count_EE + new.pair_count_EE,
                old.domain_count_ME + new.domain_count_ME,
                old.first_count_ME + new.first_count_ME,
            )
            for old, new in zip(before, snapshots, strict=True)
        ]

    def report(self, snapshots: Sequence[RoutingSnapshot]) -> list[dict[str, Any]]:
        """Return the `layers` of an `eval` line.

        Collective: one reduction of L (E^2 + 2 M E + 2) numbers, and one host read.
        """
        if not snapshots:
            return []
        counts = []
        for layer, new in enumerate(snapshots):
            old_TE = self.previous[layer] if self.previous else new.chosen_TE
            routed = (new.chosen_TE | old_TE).any(-1).sum()
            changed = (new.chosen_TE != old_TE).any(-1).sum()
            counts += [
                new.pair_count_EE.flatten(),
                new.domain_count_ME.flatten(),
                new.first_count_ME.flatten(),
                torch.stack([routed, changed]).double(),
            ]
        has_previous = bool(self.previous)
        num_domains, num_experts = snapshots[0].domain_count_ME.shape
        self.previous = [snapshot.chosen_TE for snapshot in snapshots]
        numbers = iter(all_reduce_sum(torch.cat(counts), self.engine.mesh).tolist())
        lines = []
        for layer in range(len(snapshots)):
            pairs, by_domain, first_by_domain = (
                [[int(count) for count in islice(numbers, num_experts)] for _ in range(rows)]
                for rows in (num_experts, num_domains, num_domains)
            )
            num_routed, num_changed = islice(numbers, 2)
            stability = num_changed / max(1, num_routed) if has_previous else None
            lines.append(self._line(layer, pairs, by_domain, first_by_domain, stability))
        return lines

    def _snapshot(self, layer: LayerStats, label_T: Tensor) -> RoutingSnapshot:
        chosen_TE = layer.metrics["chosen_TE"].double()
        first_TE = layer.metrics["first_TE"].double()
        # A layer may see several parts of a sample.
        label_T = label_T.repeat_interleave(len(chosen_TE) // len(label_T))
        zeros_ME = chosen_TE.new_zeros(len(self.domains), chosen_TE.shape[1])
        return RoutingSnapshot(
            layer.metrics["chosen_TE"],
            chosen_TE.t() @ chosen_TE,
            zeros_ME.index_add(0, label_T, chosen_TE),
            zeros_ME.index_add(0, label_T, first_TE),
        )

    def _line(
        self,
        layer: int,
        pairs: list[list[int]],
        by_domain: list[list[int]],
        first_by_domain: list[list[int]],
        stability: float | None,
    ) -> dict[str, Any]:
        line: dict[str, Any] = {"layer": layer}
        if stability is not None:
            line["stability"] = stability
        if len(pairs) <= MAX_EXPERTS_OF_PAIR_TABLE:
            line["co_selection"] = pairs
        if len(self.domains) > 1:
            reached = [domain for domain, row in enumerate(by_domain) if any(row)]
            line["domains"] = {self.domains[domain]: by_domain[domain] for domain in reached}
            router = router_spec(self.engine.config.moe.router.kind)
            if len(reached) > 1 and router.ordered_choices:
                line["mutual_information"] = mutual_information(first_by_domain)
        return line


def mutual_information(count_ME: Sequence[Sequence[int]]) -> float:
    """Return the mutual information of row and column in bits; 0 if all counts are 0.

    sum_me p(m, e) log2(p(m, e) / (p(m) p(e))), with p the counts over their sum.
    """
    total = sum(map(sum, count_ME))
    column_sums = [sum(column) for column in zip(*count_ME, strict=True)]
    bits = 0.0
    for row in count_ME:
        for count, column_sum in zip(row, column_sums, strict=True):
            if count:
                bits += count / total * math.log2(count * total / (sum(row) * column_sum))
    return max(0.0, bits)  # rounding can give less than 0 for independent counts


class ComputeVsLoss:
    """Relates the number of experts of a token to its loss, for routers of variable k."""

    def __init__(self, engine: Engine) -> None:
        self.engine, config = engine, engine.config.moe
        self.rows = config.top_k + 1 if router_spec(config.router.kind).variable_k else 0
        """Rows of a layer's sums, one per k; 0 if all tokens take equally many experts."""

    def update(
        self,
        stats: Sequence[LayerStats],
        loss_T: Tensor,
        valid_T: Tensor,
        before: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """Add the sums of one batch. No collective, no host read.

        Args:
            stats: of each MoE layer, with the metrics of `moe.metrics.decisions`.
            loss_T: loss of each token in nats.
            valid_T: bool, False for padding.
            before: result of the last update; empty for the first batch.

        Returns:
            For each layer float64 [K+1, 3]: tokens with k experts, their losses, the squares.
        """
        sums = [self._sums(layer, loss_T, valid_T) for layer in stats]
        return [old + new for old, new in zip(before, sums, strict=True)] if before else sums

    def report(self, sums: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Return further values of the `layers` of an `eval` line; none without variable k.

        `k_loss` has a row [k, tokens, mean loss] for each k with tokens; `k_loss_correlation` is
        there if both vary. Collective with variable k: one reduction of 3 L (K + 1) numbers, and
        one host read.
        """
        if not (sums and self.rows):
            return [{} for _ in sums]
        reduced = all_reduce_sum(torch.stack(list(sums)), self.engine.mesh)
        return [_k_loss(layer) for layer in reduced.tolist()]

    def _sums(self, layer: LayerStats, loss_T: Tensor, valid_T: Tensor) -> Tensor:
        zeros_K3 = torch.zeros(self.rows, NUM_SUMS, dtype=torch.float64, device=loss_T.device)
        if not self.rows:
            return zeros_K3
        k_T = layer.metrics["chosen_TE"].sum(-1)
        parts = len(k_T) // len(loss_T)  # a layer may see several parts of a sample
        loss_T, valid_T = loss_T.double().repeat_interleave(parts), valid_T.repeat_interleave(parts)
        sums_T3 = torch.stack([torch.ones_like(loss_T), loss_T, loss_T.square()], 1)
        return zeros_K3.index_add(0, k_T, masked(sums_T3, valid_T))


def _k_loss(sums: Sequence[Sequence[float]]) -> dict[str, Any]:
    rows = [[k, int(tokens), loss / tokens] for k, (tokens, loss, _) in enumerate(sums) if tokens]
    values, r = dict[str, Any](k_loss=rows), correlation(sums)
    return values if r is None else values | {"k_loss_correlation": r}


def correlation(sums: Sequence[Sequence[float]]) -> float | None:
    """Return Pearson's correlation of k with the loss; None if one is equal for all tokens.

    `sums`: for each k tokens, their losses in nats, the squares of these.
    """
    tokens, loss, squared_loss = (sum(row[i] for row in sums) for i in range(NUM_SUMS))
    sum_k = sum(k * row[0] for k, row in enumerate(sums))
    sum_k2 = sum(k * k * row[0] for k, row in enumerate(sums))
    sum_kl = sum(k * row[1] for k, row in enumerate(sums))
    spread_k, spread_l = tokens * sum_k2 - sum_k * sum_k, tokens * squared_loss - loss * loss
    if spread_k <= 0 or spread_l <= 1e-9 * loss * loss:  # rounding is left of equal losses
        return None
    return (tokens * sum_kl - sum_k * loss) / math.sqrt(spread_k * spread_l)
