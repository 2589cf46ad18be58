"""Differences between a checkpoint's config and the one that a run resumes with, and their effects.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from dmoe.config.fields import field_named
from dmoe.config.keywords import shown
from dmoe.config.plugin_loader import loaded_class
from dmoe.config.plugins import is_same_code, label, parse
from dmoe.config.schedule import learning_rate
from dmoe.config.schema import Config, MoEConfig

ABSENT = object()
"""Marks a field that the saved config does not have."""


SCHEDULE_FIELDS = (
    "train.steps",
    *(f"optim.{name}" for name in ("lr", "schedule", "warmup", "min_lr_ratio", "decay_fraction")),
)
"""Fields on which the learning rate depends. They may differ when a run resumes."""


def describe_learning_rate(saved: Mapping[str, Any], config: Config, step: int) -> str | None:
    """Describe a learning rate that does not go on where it was, or return None.

    A run that is made longer has another schedule, not the end of the old one: after a decay to a
    twentieth the rate would jump up again.

    Args:
        saved: the config in the checkpoint.
        config: the config to resume with.
        step: optimizer steps done.
    """
    names = [name for name, _, _ in differences(saved, asdict(config)) if name in SCHEDULE_FIELDS]
    if not names or step >= config.train.steps:
        return None
    before = {name: saved.get("optim", {}).get(name) for name in vars(config.optim)}
    known = {name: value for name, value in before.items() if value is not None}
    schedule = known.get("schedule", config.optim.schedule)
    if parse(schedule) is not None and loaded_class(schedule) is None:
        return f"optim.schedule={label(config.optim.schedule)}: before it was {label(schedule)}"
    steps = saved["train"]["steps"]
    old = learning_rate(min(step, steps - 1), steps, replace(config.optim, **known))
    new = learning_rate(step, config.train.steps, config.optim)
    if abs(new - old) <= 0.1 * old:
        return None
    changes = " and ".join(f"{name}={_value(config, name)}" for name in names)
    return (
        f"{changes}: the learning rate of step {step + 1} is {new:.3g}, not {old:.3g} as before; "
        f"optim.schedule=constant optim.warmup=0 optim.lr={old:.3g} keeps that one"
    )


def _value(section: Any, name: str) -> object:
    for part in name.split("."):
        section = getattr(section, part)
    return section


def describe_changes(
    saved: Mapping[str, Any], world_size: int, ep: int, micro_batch: int, moe: MoEConfig
) -> str | None:
    """Describe what a changed number of ranks or micro-batch size redefines, or return None.

    Token groups, which share a capacity or a switch loss, are micro-batches: consecutive sequences
    of the global batch, on whatever rank. So only their size counts.

    Args:
        saved: `world`, `ep` and `micro_batch` (sequences per virtual rank) of the checkpoint.
        world_size: number of ranks now.
        ep: expert-parallel size now.
        micro_batch: sequences per virtual rank now.
        moe: the section `moe` of the config now.
    """
    resharded = (saved["world"], saved["ep"]) != (world_size, ep)
    before = saved["micro_batch"]
    capacity, balance = moe.capacity, moe.balance
    per_micro_batch = {
        "capacity": capacity.factor is not None and capacity.group == "rank",
        "the switch loss": balance.switch > 0 and balance.switch_level == "micro_batch",
    }
    redefined = [name for name, applies in per_micro_batch.items() if applies]
    parts = []
    if resharded:
        parts.append(
            f"written by {saved['world']} ranks with EP {saved['ep']}, goes on with {world_size} "
            f"and EP {ep}: weights, moments and data order are the same"
        )
    if redefined and before != micro_batch:
        go = "goes" if len(redefined) == 1 else "go"
        parts.append(
            f"{' and '.join(redefined)} now {go} by groups of {micro_batch} sequences, "
            f"not {before} (train.micro_batch={before} keeps them)"
        )
    return "; ".join(parts) or None


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, old and new value of each field that differs between two configs as mappings."""
    for key, value in now.items():
        name, old = shown(f"{prefix}{key}"), before.get(key, ABSENT)
        if isinstance(value, dict) and field_named(name) is None:
            yield from differences(old if isinstance(old, Mapping) else {}, value, f"{name}.")
        # A field that a newer version has added is absent: its default keeps the old meaning.
        elif old is not ABSENT and old != value and not is_same_code(old, value, name):
            yield name, old, value
