"""Mixture of domains by given weights (data.weights); how they are drawn is in mixture.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data.mixture import MixtureDataset, block_quotas, domains_to_draw
from dmoe.data.packing import PackedDataset


def mix_by_weights(
    packed: PackedDataset, weights: Mapping[str, float], names: Sequence[str]
) -> MixtureDataset:
    """Return a dataset that draws the domains of `packed` in proportion to given weights.

    Args:
        packed: the training sequences.
        weights: positive, by name of the domain; every domain has one.
        names: of the domains, by label.

    Raises:
        ConfigError: on data.weights: a domain without a weight, a weight without a domain or whose
            domain is shorter than a sequence, a weight that is not positive, or too many domains.
    """
    field, shown = "data.weights", ", ".join(weights)
    trained = {names[label] for _, label in packed.runs}
    if unknown := sorted(weights.keys() - trained):
        allowed = f"has no domain of training named {unknown[0]}"
        raise ConfigError(field, shown, allowed, f"use {', '.join(sorted(trained)[:20])}")
    if missing := sorted(trained - weights.keys()):
        allowed = f"must have a weight for every domain, and {missing[0]} has none"
        raise ConfigError(field, shown, allowed, f"set data.weights.{missing[0]}=1")
    for name, weight in weights.items():
        if not 0 < weight < math.inf:
            allowed = "must be above 0"
            fix = "leave the text out of data.source, or use a small weight"
            raise ConfigError(f"{field}.{name}", weight, allowed, fix)
    domains = domains_to_draw(packed, field, shown)
    if short := sorted(trained - {names[domain.label] for domain in domains}):
        allowed = f"has a weight for {short[0]}, whose text holds the start of no sequence"
        raise ConfigError(field, shown, allowed, "use a smaller data.seq_len, or leave it out")
    quotas = block_quotas([weights[names[domain.label]] for domain in domains])
    return MixtureDataset(packed, tuple(domains), quotas)


def refuse_both(config: DataConfig) -> None:
    """Refuse data.weights with data.temperature. Raises ConfigError on the latter."""
    if config.weights and config.temperature is not None:
        allowed = "says how domains are drawn, and so does data.weights"
        raise ConfigError("data.temperature", config.temperature, allowed, "leave one of them out")
