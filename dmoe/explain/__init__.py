"""A config explained in sentences and numbers: `dmoe explain`.

Allocates no weights, starts no process and reads no file but the tokenizer's.
"""

from __future__ import annotations

from dataclasses import replace

from dmoe.config.schema import Config
from dmoe.explain import cost, placement, routing
from dmoe.explain.setting import Section, Setting, resolve

__all__ = ["Section", "Setting", "explain"]

TOPICS = (
    routing.explain_batch,
    placement.explain_placement,
    routing.explain_routing,
    routing.explain_capacity,
    routing.explain_balance,
    placement.explain_modules,
    routing.explain_recommended,
    cost.explain_exchange,
    cost.explain_size,
    cost.explain_optimization,
    routing.explain_evaluation,
)


def explain(config: Config, world: int, ranks_per_node: int | None = None) -> list[Section]:
    """Explain `config` on `world` ranks, which need not exist. Raises ConfigError.

    With `ranks_per_node`, ranks of one machine, it says which exchanges cross the network.
    """
    setting = replace(resolve(config, world), ranks_per_node=ranks_per_node)
    sections = (topic(setting) for topic in TOPICS)
    return [section for section in sections if section is not None]
