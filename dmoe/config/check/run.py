"""The rest of a run: optimizer, data, tracking, checkpoints."""

from __future__ import annotations

import difflib

from dmoe.config.check.ranges import values
from dmoe.config.errors import ConfigError
from dmoe.config.fields import list_fields
from dmoe.config.schema import Config

__all__ = ["check_run"]


def check_run(config: Config, world: int) -> None:
    for name, value in values(config, "optim.beta1 optim.beta2"):
        if value >= 1:
            raise ConfigError(name, value, "must be below 1", "use the default")
    if not 0.0 < config.data.holdout < 1.0:
        raise ConfigError("data.holdout", config.data.holdout, "must be between 0 and 1, both excluded", "use 0.05")
    unknown = set(config.tracking.trackers) - {"wandb", "tensorboard"}
    if unknown:
        raise ConfigError(
            "tracking.trackers", sorted(unknown)[0], "must be wandb or tensorboard", "metrics.jsonl is always written"
        )
    for field in ("load", "straggler"):
        limit = getattr(config.alerts, field)
        if limit is not None and limit <= 1:
            raise ConfigError(
                f"alerts.{field}", limit, "must be above 1, which is perfect balance", "use the default, or null for none"
            )
    _profiled(config, world)
    if config.checkpoint.accept_changes:
        _accepted(config.checkpoint.accept_changes)


def _profiled(config: Config, world: int) -> None:
    """A step or a rank that never comes would leave no trace, and no word of it."""
    for field, first, last in (("profile_steps", 1, config.train.steps), ("profile_ranks", 0, world - 1)):
        for number in getattr(config.train, field):
            if not first <= number <= last:
                raise ConfigError(f"train.{field}", number, f"must be from {first} to {last}", "name one that there is")


def _accepted(names: list[str]) -> None:
    """Each must be a field or a section: a name with a slip in it would accept nothing, and say so only when the run is resumed."""
    known = [field.name for field in list_fields()]
    known += sorted({name[:end] for name in known for end, letter in enumerate(name) if letter == "."})
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            fix = f"did you mean {near[0]}?" if near else "see `dmoe explain --fields`"
            raise ConfigError("checkpoint.accept_changes", name, "is neither a field nor a section of the config", fix)
