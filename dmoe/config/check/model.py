"""The transformer: widths that divide, and which of its blocks are mixtures of experts."""

from __future__ import annotations

from dmoe.config.errors import ConfigError
from dmoe.config.schema import Config

__all__ = ["check_model", "head_dim", "moe_blocks"]


def moe_blocks(config: Config) -> list[int]:
    """Indices of the blocks whose feed-forward is a mixture of experts."""
    model = config.model
    if model.moe_every == 0:
        return []
    return [i for i in range(model.dense_first, model.layers) if (i - model.dense_first + 1) % model.moe_every == 0]


def head_dim(config: Config) -> int:
    return config.model.head_dim or config.model.dim // config.model.heads


def check_model(config: Config) -> None:
    model = config.model
    if model.head_dim is None and model.dim % model.heads:
        raise ConfigError("model.dim", model.dim, f"must be divisible by model.heads={model.heads}", "or set model.head_dim")
    if head_dim(config) % 2:
        raise ConfigError("model.head_dim", head_dim(config), "must be even for rotary positions", "use an even width per head")
    if model.kv_heads is not None and model.heads % model.kv_heads:
        raise ConfigError("model.kv_heads", model.kv_heads, f"must divide model.heads={model.heads}", f"use {model.heads}")
    if model.dense_first > model.layers:
        raise ConfigError("model.dense_first", model.dense_first, f"must be at most model.layers={model.layers}", "lower it")
