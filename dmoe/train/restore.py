"""A model out of a run directory, in one process with all experts, at whatever world and EP size it was trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dmoe import checkpoint
from dmoe.checkpoint.manifest import step_name
from dmoe.config.errors import CheckpointError
from dmoe.config.load import load as load_config
from dmoe.config.schema import Config
from dmoe.distributed.mesh import ParallelMesh
from dmoe.distributed.state_dict import model_state
from dmoe.models.base import Model
from dmoe.runs.directory import RunDir
from dmoe.train import engine as precisions
from dmoe.train.modular.attach import attach_modules
from dmoe.train.tasks import Task, task_of

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Restored:
    config: Config
    model: Model
    """In evaluation mode."""
    task: Task
    step: int
    device: torch.device

    def autocast(self) -> torch.autocast:
        """The precision the run was trained and evaluated in; float32 where this device does not have it."""
        wanted = self.config.train.precision
        lacking = wanted == "fp16" and self.device.type == "cpu"
        precision = (
            "fp32" if lacking else precisions.resolve(wanted, self.device, self.config.model.dim)
        )
        return torch.autocast(
            self.device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST
        )


def restore(run: RunDir, step: int | None = None) -> Restored:
    """The model of `run` after `step` steps, by default the newest whole checkpoint. Reads weights only, no optimizer state.

    Raises: CheckpointError if there is no such checkpoint, or none that is whole; ConfigError if the tokenizer's file is gone.
    """
    config = load_config(run.path / "resolved.yaml")
    path = _find(run, step)
    task = task_of(config)
    device = torch.device(
        "cuda" if torch.cuda.is_available() and config.train.device != "cpu" else "cpu"
    )
    with torch.device("meta"):
        model = task.model()
        attach_modules(model, config)
    model.to_empty(device=device)
    state = model_state(model, ParallelMesh())
    filled = {name.removeprefix("model.") for name in state}
    assert filled >= {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}, (
        "a buffer that no checkpoint holds"
    )
    extra = checkpoint.load(path, state, prefix="model.")
    return Restored(config, model.eval(), task, int(extra["step"]), device)


def _find(run: RunDir, step: int | None) -> Path:
    if step is None:
        newest = checkpoint.find_latest(run.checkpoints)
        if newest is None:
            raise CheckpointError(
                f"{run.path} has no checkpoint yet: train longer, or lower checkpoint.every"
            )
        return newest
    path = run.checkpoints / step_name(step)
    if not path.is_dir():
        there = (
            ", ".join(str(number) for number, _ in checkpoint.list_steps(run.checkpoints)) or "none"
        )
        raise CheckpointError(f"{run.path} has no checkpoint of step {step}: there are {there}")
    return path


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
