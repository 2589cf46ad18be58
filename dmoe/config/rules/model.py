"""The network: widths that divide, and where it has mixtures of experts.

How large a model is at the least, and whether this machine could hold it: before torch is asked to, and the kernel ends the process.

Letters: D model width, F expert hidden width, E experts, A width of a head. The token embedding is left out (it needs the
tokenizer), and so are norms, routers and activations: what is computed here is a lower bound.
"""

from __future__ import annotations

from dmoe.config.datasets import chosen_streams, columns_of
from dmoe.config.errors import ConfigError
from dmoe.config.schema import Config


def moe_blocks(config: Config) -> list[int]:
    """Indices of the blocks whose feed-forward is a mixture of experts."""
    model = config.model
    if model.moe_every == 0 or (config.train.task == "classification" and model.fusion == "gated"):
        return []
    return [
        i
        for i in range(model.dense_first, model.layers)
        if (i - model.dense_first + 1) % model.moe_every == 0
    ]


def moe_widths(config: Config) -> list[tuple[int, int]]:
    """Width in and width out of every mixture layer of the network, first to last: in blocks, and a classifier's others."""
    model = config.model
    blocks = [(model.dim, model.dim)] * len(moe_blocks(config))
    if config.train.task != "classification":
        return blocks
    encoders = [(model.dim, model.dim)] if model.fusion == "gated" else []
    if model.head != "experts":
        return encoders + blocks
    width = model.dim if model.layers else sum(chosen_streams(config.data).values())
    return [*encoders, *blocks, (width, len(columns_of(config.data).classes))]


def head_dim(config: Config) -> int:
    return config.model.head_dim or config.model.dim // config.model.heads


def check_model(config: Config) -> None:
    model = config.model
    if model.dense_first > model.layers:
        raise ConfigError(
            "model.dense_first",
            model.dense_first,
            f"must be at most model.layers={model.layers}",
            "lower it",
        )
    if config.train.task == "classification":  # no attention
        return
    if model.layers < 1:
        raise ConfigError("model.layers", model.layers, "must be 1 or more", "use 1")
    if model.head_dim is None and model.dim % model.heads:
        raise ConfigError(
            "model.dim",
            model.dim,
            f"must be divisible by model.heads={model.heads}",
            "or set model.head_dim",
        )
    if head_dim(config) % 2:
        raise ConfigError(
            "model.head_dim",
            head_dim(config),
            "must be even for rotary positions",
            "use an even width per head",
        )
    if model.kv_heads is not None and model.heads % model.kv_heads:
        raise ConfigError(
            "model.kv_heads",
            model.kv_heads,
            f"must divide model.heads={model.heads}",
            f"use {model.heads}",
        )
