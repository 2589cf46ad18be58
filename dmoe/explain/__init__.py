"""What a config means, in words and numbers: `dmoe explain`. Nothing is allocated, started or read but the tokenizer's file."""

from __future__ import annotations

from dmoe.config.schema import Config
from dmoe.explain import (
    balance,
    batch,
    capacity,
    evaluation,
    exchange,
    modules,
    optimization,
    placement,
    recommended,
    routing,
    size,
)
from dmoe.explain.section import Section
from dmoe.explain.setting import Setting, resolve

__all__ = ["Section", "Setting", "explain"]

PARTS = (
    batch,
    placement,
    routing,
    capacity,
    balance,
    modules,
    recommended,
    exchange,
    size,
    optimization,
    evaluation,
)


def explain(config: Config, world: int) -> list[Section]:
    """The sections of the explanation of `config` on `world` ranks, which need not be there. Raises ConfigError."""
    setting = resolve(config, world)
    return [section for part in PARTS if (section := part.describe(setting)) is not None]
