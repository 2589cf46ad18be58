"""What may differ between a checkpoint's config and the one that takes it up, and what that redefines.

A run's meaning is its model, its data and its batches. What only says how fast, how often or where may change; the learning rate
and its schedule may too, since changing them in the middle is what people do. Anything else is refused by name, unless
`checkpoint.accept_changes` names it. Tensors of other shapes are refused in any case, when they are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from dmoe.config.errors import CheckpointError
from dmoe.config.schema import Config

MEANING = ("model", "moe", "modular", "train.seed", "train.global_batch")
"""Sections and fields that say what is trained, in which batches. What it is trained on, the data's fingerprint says."""
NEUTRAL = ("moe.exchange", "modular.core", "modular.compositions")
"""In those sections, what changes no number beyond rounding, or no number any more: what the weights started from; or
no number of the training: what is evaluated at the end."""
ABSENT = object()


def check_same_run(saved: Mapping[str, Any], saved_data: str, config: Config, data: str) -> None:
    """Refuse a config that means another run than `saved`, the config inside a checkpoint, whose data had fingerprint `saved_data`.

    Raises: CheckpointError naming the field, both values, and how to go on.
    """
    changed = list(_differences(saved, asdict(config)))
    for name, before, now in changed:
        if _under(name, MEANING) and not _under(name, NEUTRAL):
            _refuse(name, now, f"the checkpoint was trained with {before}", config)
    if saved_data != data:
        fields = [
            change
            for change in changed
            if _under(change[0], ("data",)) and change[0] != "data.eval_source"
        ]
        for name, before, now in fields:
            _refuse(name, now, f"the checkpoint was trained with {before}", config)
        if not fields:
            _refuse(
                "data.source",
                config.data.source,
                "its content is not what the checkpoint was trained on",
                config,
            )


def _refuse(name: str, now: object, was: str, config: Config) -> None:
    if _under(name, ("modular",)):  # which tensors there are, and which have moments, depends on it
        raise CheckpointError(
            f"{name}={now}: {was}; use that, or go on from this run in another train.run_dir, with this one as modular.core"
        )
    accepted = config.checkpoint.accept_changes
    if not _under(name, accepted):
        all_of_them = ",".join([*accepted, name])
        raise CheckpointError(
            f"{name}={now}: {was}; use that, or another train.run_dir, or accept it with checkpoint.accept_changes=[{all_of_them}]"
        )


def describe_changes(
    saved: Mapping[str, Any], world: int, ep: int, micro_batch: int, config: Config
) -> str | None:
    """One line on what another number of ranks or another micro-batch redefines, or None if nothing changes.

    `saved`: world, ep and micro_batch (sequences of one virtual rank) of the checkpoint. A group of tokens that share a capacity, or a
    balance loss, is one micro-batch: consecutive sequences of the global batch, whoever holds them. So its size is all that counts.
    """
    moved, before = (saved["world"], saved["ep"]) != (world, ep), saved["micro_batch"]
    capacity, balance = config.moe.capacity, config.moe.balance
    grouped = {
        "capacity": capacity.factor is not None and capacity.group == "rank",
        "the switch loss": balance.switch > 0 and balance.switch_level == "micro_batch",
    }
    what = [
        name for name, by_micro_batch in grouped.items() if by_micro_batch and before != micro_batch
    ]
    parts = []
    if moved:
        was = f"written by {saved['world']} ranks with EP {saved['ep']}, goes on with {world} and EP {ep}"
        parts.append(f"{was}: weights, moments and data order are the same")
    if what:
        goes = "goes" if len(what) == 1 else "go"
        parts.append(
            f"{' and '.join(what)} now {goes} by groups of {micro_batch} sequences, not {before} "
            f"(train.micro_batch={before} keeps them)"
        )
    return "; ".join(parts) or None


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for key, value in now.items():
        name, old = f"{prefix}{key}", before.get(key, ABSENT)
        if isinstance(value, dict):
            yield from _differences(old if isinstance(old, Mapping) else {}, value, f"{name}.")
        elif (
            old is not ABSENT and old != value
        ):  # a field that a newer version has added means what was so before
            yield name, old, value


def _under(name: str, sections: tuple[str, ...] | list[str]) -> bool:
    return any(name == section or name.startswith(f"{section}.") for section in sections)
