"""Values that do not fit together, refused before torch starts. Each rule names the field, what is allowed, and the fix.

ranges: each value by itself. classifier, model, router, experts, moe, parallel, run: values together. size: what a machine can hold.
"""

from __future__ import annotations

from dmoe.config.rules.classification import check_task
from dmoe.config.rules.model import check_model, head_dim, moe_blocks, moe_widths
from dmoe.config.rules.modular import check_modular
from dmoe.config.rules.moe import check_moe, check_shapes, check_zero_cost
from dmoe.config.rules.parallel import (
    Batching,
    batching,
    can_share,
    check_memory,
    check_size,
    check_world,
    expert_parallel,
    shares_something,
)
from dmoe.config.rules.router import READ_BY, WITHOUT_ORDER, check_router
from dmoe.config.rules.run import check_ranges, check_run
from dmoe.config.schema import Config
from dmoe.config.secrets import refuse_secrets

__all__ = [
    "READ_BY",
    "WITHOUT_ORDER",
    "Batching",
    "batching",
    "can_share",
    "check",
    "check_memory",
    "check_router",
    "check_shapes",
    "check_zero_cost",
    "expert_parallel",
    "head_dim",
    "moe_blocks",
    "moe_widths",
    "shares_something",
]


def check(config: Config, world: int = 1) -> None:
    """Refuse what cannot work on `world` ranks. Raises ConfigError with the first reason found."""
    refuse_secrets(config)
    check_ranges(config)
    check_world(world)
    check_task(config)
    check_model(config)
    check_moe(config)
    check_modular(config)
    check_size(config)
    expert_parallel(config, world)
    batching(config, world)
    check_run(config, world)
