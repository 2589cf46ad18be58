"""The rest of a run: optimizer, data, tracking, checkpoints.

Each value by itself: at least, at most, positive.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from dmoe.config.errors import ConfigError
from dmoe.config.fields import list_fields
from dmoe.config.schema import Config


def check_run(config: Config, world: int) -> None:
    for name, value in values(config, "optim.beta1 optim.beta2"):
        if value >= 1:
            raise ConfigError(name, value, "must be below 1", "use the default")
    if not 0.0 < config.data.holdout < 1.0:
        raise ConfigError(
            "data.holdout",
            config.data.holdout,
            "must be between 0 and 1, both excluded",
            "use 0.05",
        )
    unknown = set(config.tracking.trackers) - {"wandb", "tensorboard"}
    if unknown:
        raise ConfigError(
            "tracking.trackers",
            sorted(unknown)[0],
            "must be wandb or tensorboard",
            "metrics.jsonl is always written",
        )
    for field in ("load", "straggler"):
        limit = getattr(config.alerts, field)
        if limit is not None and limit <= 1:
            raise ConfigError(
                f"alerts.{field}",
                limit,
                "must be above 1, which is perfect balance",
                "use the default, or null for none",
            )
    _profiled(config, world)
    if config.checkpoint.accept_changes:
        _accepted(config.checkpoint.accept_changes)


def _profiled(config: Config, world: int) -> None:
    """A step or a rank that never comes would leave no trace, and no word of it."""
    for field, first, last in (
        ("profile_steps", 1, config.train.steps),
        ("profile_ranks", 0, world - 1),
    ):
        for number in getattr(config.train, field):
            if not first <= number <= last:
                raise ConfigError(
                    f"train.{field}",
                    number,
                    f"must be from {first} to {last}",
                    "name one that there is",
                )


def _accepted(names: list[str]) -> None:
    """Each must be a field or a section: a name with a slip in it would accept nothing, and say so only when the run is resumed."""
    known = [field.name for field in list_fields()]
    known += sorted(
        {name[:end] for name in known for end, letter in enumerate(name) if letter == "."}
    )
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            fix = f"did you mean {near[0]}?" if near else "see `dmoe explain --fields`"
            raise ConfigError(
                "checkpoint.accept_changes",
                name,
                "is neither a field nor a section of the config",
                fix,
            )


AT_LEAST_ONE = (
    "model.dim model.heads moe.num_experts moe.top_k moe.expert_dim moe.capacity.min_capacity parallel.virtual_ranks "
    "data.seq_len train.steps train.global_batch train.log_every train.eval_sequences checkpoint.keep "
    "guard.spike_window guard.patience guard.attempts alerts.patience"
)
NOT_NEGATIVE = (
    "model.layers model.moe_every model.dense_first moe.experts.shared moe.balance.switch moe.balance.z moe.balance.importance "
    "moe.balance.load moe.balance.usage_std moe.balance.bias train.eval_every train.sample_tokens "
    "moe.experts.zero moe.experts.copy moe.experts.constant "
    "optim.warmup optim.weight_decay checkpoint.every train.seed optim.min_lr_ratio optim.decay_fraction"
)
POSITIVE = (
    "optim.lr optim.eps model.rope_base model.norm_eps model.init_std moe.router.scale parallel.timeout parallel.start_timeout "
    "guard.spike_deviations"
)
OPTIONAL_POSITIVE = (
    "model.kv_heads model.head_dim model.dense_dim moe.capacity.factor moe.capacity.eval_factor moe.experts.shared_dim "
    "train.micro_batch optim.clip data.tokenizer_vocab data.temperature "
    "alerts.load alerts.dead_share alerts.drop_rate alerts.certainty alerts.straggler"
)
AT_MOST_ONE = "optim.min_lr_ratio optim.decay_fraction optim.beta1 optim.beta2"
AT_MOST = {
    "model.dim": 1 << 20,
    "model.layers": 10_000,
    "model.heads": 1 << 16,
    "model.kv_heads": 1 << 16,
    "model.head_dim": 1 << 16,
    "model.dense_dim": 1 << 24,
    "moe.num_experts": 1 << 20,
    "moe.expert_dim": 1 << 24,
    "moe.experts.shared": 1 << 16,
    "moe.experts.shared_dim": 1 << 24,
    "moe.experts.zero": 1 << 16,
    "moe.experts.copy": 1 << 16,
    "moe.experts.constant": 1 << 16,
    "parallel.ep": 1 << 20,
    "parallel.virtual_ranks": 1 << 16,
    "data.seq_len": 1 << 27,
    "data.tokenizer_vocab": 1 << 24,
    "train.global_batch": 1 << 30,
    "train.micro_batch": 1 << 30,
    "train.eval_sequences": 1 << 30,
    "train.sample_tokens": 1 << 20,
    "train.seed": (1 << 63) - 1,
    "guard.spike_window": 1 << 20,
}
"""Far above anything that was ever trained. Beyond them a number is a slip of the finger, which must not end in the middle of an
allocation, hours later in an overflow, or with the machine out of memory."""
LARGEST = 10**12
"""Of every other whole number: steps, intervals, counts."""
LONGEST = 365 * 24 * 3600.0
"""Seconds: torch takes time-outs as 64-bit nanoseconds, and a run that waits a year waits for ever."""


def check_ranges(config: Config) -> None:
    for name, number in _integers(config, ""):
        if number > AT_MOST.get(name, LARGEST):
            raise ConfigError(
                name,
                _short(number),
                f"must be at most {AT_MOST.get(name, LARGEST)}",
                "is there a digit too many?",
            )
    for name, value in values(config, "parallel.timeout parallel.start_timeout"):
        if value > LONGEST:
            raise ConfigError(
                name, value, f"must be at most {LONGEST:.0f} seconds, a year", "use 600"
            )
    for name, value in values(config, AT_LEAST_ONE):
        if value < 1:
            raise ConfigError(name, value, "must be 1 or more", "use 1")
    for name, value in values(config, NOT_NEGATIVE):
        if value < 0:
            raise ConfigError(name, value, "must not be negative", "use 0")
    for name, value in values(config, f"{POSITIVE} {OPTIONAL_POSITIVE}"):
        if value <= 0:
            raise ConfigError(
                name, value, "must be greater than 0", "use a positive number or leave it out"
            )
    for name, value in values(config, AT_MOST_ONE):
        if not 0 <= value <= 1:
            raise ConfigError(name, value, "must be between 0 and 1", "use the default")


def _integers(section: Any, prefix: str) -> Iterator[tuple[str, int]]:
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            yield from _integers(value, f"{prefix}{item.name}.")
        elif isinstance(value, int) and not isinstance(value, bool):
            yield f"{prefix}{item.name}", value


def _short(number: int) -> str:
    text = str(number)
    return text if len(text) <= 30 else f"{text[:12]}... ({len(text)} digits)"


def values(config: Config, names: str) -> Iterator[tuple[str, float]]:
    """Name and value of each dotted name in `names`, a text of names with spaces; those that are null are left out."""
    for name in names.split():
        value: object = config
        for part in name.split("."):
            value = getattr(value, part)
        if value is not None:
            assert isinstance(value, int | float), name
            yield name, value
