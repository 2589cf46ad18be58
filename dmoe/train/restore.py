"""A model out of a run directory, in one process with all experts, at whatever world and EP size it was trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
