"""Rules about values that do not fit together, checked before torch is imported.

Bounds of single values stand beside their fields (`dmoe/config/schema`). model: the network, its
task and its MoE layers. layer: one MoE layer, from a config file or from Python. modular: modules.
published: a model of transformers. parallel: ranks and batches. exchange: options of the exchange.
memory: what fits.
"""

from __future__ import annotations

from dmoe.config.fields import check_accept_changes
from dmoe.config.plugins import check_options
from dmoe.config.rules.exchange import (
    check_chunks_divide,
    check_exchange,
    check_row_kernels,
    check_two_nodes,
)
from dmoe.config.rules.layer import check_arguments, check_fields_read, check_router
from dmoe.config.rules.memory import check_memory
from dmoe.config.rules.model import (
    check_model,
    check_moe,
    check_optim,
    check_task,
    head_dim,
    moe_blocks,
    moe_widths,
)
from dmoe.config.rules.modular import check_modular, check_modules_used
from dmoe.config.rules.parallel import (
    Batching,
    batching,
    can_share,
    check_placement,
    check_profile,
    check_size,
    check_world,
    expert_parallel,
    shares_something,
)
from dmoe.config.rules.published import check_published, refuse_lora
from dmoe.config.rules.replay import check_replay
from dmoe.config.schema import Config
from dmoe.config.schema.constraints import check_bounds, check_only_for, check_types
from dmoe.config.secrets import refuse_secrets

__all__ = [
    "Batching",
    "batching",
    "can_share",
    "check",
    "check_arguments",
    "check_memory",
    "check_router",
    "check_two_nodes",
    "expert_parallel",
    "head_dim",
    "moe_blocks",
    "moe_widths",
    "shares_something",
]


def check(config: Config, world: int = 1) -> None:
    """Refuse what cannot work on `world` ranks.

    Raises:
        ConfigError: the first reason found.
    """
    check_types(config)
    refuse_secrets(config)
    # Fields that nothing reads come before their values: the fix is to leave them out.
    check_modules_used(config.modular)
    check_only_for(config)
    check_fields_read(config.moe.router)
    check_bounds(config)
    check_options(config)
    check_world(world)
    check_task(config)
    if config.model.source is None:
        refuse_lora(config.model.lora)
        check_model(config)
        check_moe(config)
    else:
        check_published(config)
    check_modular(config)
    check_replay(config)
    check_optim(config)
    check_placement(config)
    check_exchange(config)
    check_row_kernels(config)
    check_size(config)
    check_chunks_divide(config, expert_parallel(config, world))
    batching(config, world)
    check_profile(config.train, world)
    check_accept_changes(config.checkpoint.accept_changes)
