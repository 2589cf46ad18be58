"""Values that do not fit together, refused before torch starts. Each rule names the field, what is allowed, and the fix.

Letters: W world size, EP expert-parallel degree, V virtual ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dmoe.config.errors import ConfigError
from dmoe.config.schema import Config

__all__ = ["Batching", "batching", "check", "expert_parallel", "head_dim", "moe_blocks"]

AT_LEAST_ONE = (
    "model.dim model.layers model.heads moe.num_experts moe.top_k moe.expert_dim moe.capacity.min_capacity parallel.virtual_ranks "
    "data.seq_len train.steps train.global_batch train.log_every train.eval_sequences checkpoint.keep"
)
NOT_NEGATIVE = (
    "model.moe_every model.dense_first moe.experts.shared moe.balance.switch moe.balance.z train.eval_every train.sample_tokens "
    "optim.warmup optim.weight_decay checkpoint.every train.seed optim.min_lr_ratio optim.decay_fraction"
)
POSITIVE = (
    "optim.lr optim.eps model.rope_base model.norm_eps model.init_std moe.router.scale parallel.timeout parallel.start_timeout"
)
OPTIONAL_POSITIVE = (
    "model.kv_heads model.head_dim model.dense_dim moe.capacity.factor moe.capacity.eval_factor moe.experts.shared_dim "
    "train.micro_batch optim.clip data.tokenizer_vocab"
)
AT_MOST_ONE = "optim.min_lr_ratio optim.decay_fraction optim.beta1 optim.beta2"


@dataclass(frozen=True)
class Batching:
    """How a global batch is cut: `global_batch = W * V * micro_batch * accumulation`."""

    micro_batch: int
    """Sequences of one virtual rank's micro-batch."""
    accumulation: int
    """Micro-batches a virtual rank takes one after the other in an optimizer step."""


def check(config: Config, world: int = 1) -> None:
    """Refuse what cannot work on `world` ranks. Raises ConfigError with the first reason found."""
    _ranges(config)
    _model(config)
    _moe(config)
    expert_parallel(config, world)
    batching(config, world)
    _rest(config)


def expert_parallel(config: Config, world: int) -> int:
    """EP: the number given, or for `auto` the largest one that divides both the world and the number of experts."""
    ep, experts = config.parallel.ep, config.moe.num_experts
    if ep == "auto":
        return math.gcd(world, experts) if moe_blocks(config) else 1
    if not isinstance(ep, int) or ep < 1:
        raise ConfigError("parallel.ep", ep, "must be auto or a number of ranks from 1 up", "use parallel.ep=auto")
    fits = [n for n in range(1, world + 1) if world % n == 0 and experts % n == 0]
    if world % ep:
        raise ConfigError("parallel.ep", ep, f"must divide the world of {world} ranks", f"use one of {fits}")
    if experts % ep:
        raise ConfigError("moe.num_experts", experts, f"must be divisible by parallel.ep={ep}", f"use parallel.ep from {fits}")
    return ep


def batching(config: Config, world: int) -> Batching:
    """Micro-batch and accumulation from the global batch; the global batch never depends on the world."""
    ranks = world * config.parallel.virtual_ranks
    batch, micro = config.train.global_batch, config.train.micro_batch
    if batch % ranks:
        nearest = max(1, round(batch / ranks)) * ranks
        raise ConfigError(
            "train.global_batch", batch, f"must be a multiple of the {ranks} (virtual) ranks that share it", f"use {nearest}"
        )
    share = batch // ranks
    micro = share if micro is None else micro
    if share % micro:
        fits = max(n for n in range(1, min(micro, share) + 1) if share % n == 0)
        raise ConfigError("train.micro_batch", micro, f"must divide the {share} sequences of one (virtual) rank", f"use {fits}")
    return Batching(micro, share // micro)


def moe_blocks(config: Config) -> list[int]:
    """Indices of the blocks whose feed-forward is a mixture of experts."""
    model = config.model
    if model.moe_every == 0:
        return []
    return [i for i in range(model.dense_first, model.layers) if (i - model.dense_first + 1) % model.moe_every == 0]


def head_dim(config: Config) -> int:
    return config.model.head_dim or config.model.dim // config.model.heads


def _model(config: Config) -> None:
    model = config.model
    if model.head_dim is None and model.dim % model.heads:
        raise ConfigError("model.dim", model.dim, f"must be divisible by model.heads={model.heads}", "or set model.head_dim")
    if head_dim(config) % 2:
        raise ConfigError("model.head_dim", head_dim(config), "must be even for rotary positions", "use an even width per head")
    if model.kv_heads is not None and model.heads % model.kv_heads:
        raise ConfigError("model.kv_heads", model.kv_heads, f"must divide model.heads={model.heads}", f"use {model.heads}")
    if model.dense_first > model.layers:
        raise ConfigError("model.dense_first", model.dense_first, f"must be at most model.layers={model.layers}", "lower it")


def _moe(config: Config) -> None:
    moe, router = config.moe, config.moe.router
    if moe.top_k > moe.num_experts:
        raise ConfigError(
            "moe.top_k", moe.top_k, f"must be at most moe.num_experts={moe.num_experts}", f"use {moe.num_experts} or less"
        )
    if moe.top_k == 1 and router.renormalize:
        raise ConfigError(
            "moe.router.renormalize",
            True,
            "with moe.top_k=1 makes every weight 1 and starves the router of gradient",
            "set it to false",
        )
    if moe.exchange == "padded" and moe.capacity.factor is None:
        raise ConfigError(
            "moe.exchange", "padded", "sends a fixed number of slots and so needs moe.capacity.factor", "set it, e.g. to 1.25"
        )


def _rest(config: Config) -> None:
    train, optim = config.train, config.optim
    if not 0.0 < config.data.holdout < 1.0:
        raise ConfigError("data.holdout", config.data.holdout, "must be between 0 and 1, both excluded", "use 0.05")
    if optim.warmup > train.steps:
        raise ConfigError(
            "optim.warmup", optim.warmup, f"must be at most train.steps={train.steps}", f"use {train.steps // 20}"
        )
    unknown = set(config.tracking.trackers) - {"wandb", "tensorboard"}
    if unknown:
        raise ConfigError(
            "tracking.trackers", sorted(unknown)[0], "must be wandb or tensorboard", "metrics.jsonl is always written"
        )


def _ranges(config: Config) -> None:
    for name, value in _values(config, AT_LEAST_ONE):
        if value < 1:
            raise ConfigError(name, value, "must be 1 or more", "use 1")
    for name, value in _values(config, NOT_NEGATIVE):
        if value < 0:
            raise ConfigError(name, value, "must not be negative", "use 0")
    for name, value in _values(config, f"{POSITIVE} {OPTIONAL_POSITIVE}"):
        if value <= 0:
            raise ConfigError(name, value, "must be greater than 0", "use a positive number or leave it out")
    for name, value in _values(config, AT_MOST_ONE):
        if not 0 <= value <= 1:
            raise ConfigError(name, value, "must be between 0 and 1", "use the default")


def _values(config: Config, names: str) -> Iterator[tuple[str, float]]:
    for name in names.split():
        value: object = config
        for part in name.split("."):
            value = getattr(value, part)
        if value is not None:
            assert isinstance(value, int | float), name
            yield name, value
