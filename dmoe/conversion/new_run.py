"""A run directory at step 0, with weights that no training has drawn.

Memory: three times the weights, since Adam's moments are saved as zeros.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import dmoe
from dmoe.checkpoint import list_steps, save
from dmoe.config.errors import ConfigError
from dmoe.config.rules import batching
from dmoe.config.schema import Config
from dmoe.distributed.init import ProcessInfo
from dmoe.distributed.mesh import ParallelMesh
from dmoe.distributed.state_dict import model_state, optimizer_state
from dmoe.models.base import Model
from dmoe.train.modular import select_trainable_parameters
from dmoe.train.optimizer import build_optimizer
from dmoe.train.run_session import open_session
from dmoe.train.step_guard import StepGuard
from dmoe.train.tasks import DataSplits


def write_run(config: Config, config_text: str, model: Model, extra: dict[str, Any]) -> Path:
    """Write a run directory with a checkpoint of step 0, from which `dmoe train` continues.

    Args:
        config: of the run.
        config_text: text of its file, stored in the run directory.
        model: with all its experts.
        extra: see `first_extra`.

    Returns:
        The run directory.

    Raises:
        ConfigError: it has checkpoints already, or is in use.
    """
    session = open_session(config.train, ProcessInfo(0, 1, 0, torch.device("cpu")))
    try:
        if list_steps(session.directory.checkpoints):
            raise ConfigError(
                "train.run_dir",
                config.train.run_dir,
                "holds a run with checkpoints",
                "name a new directory",
            )
        session.write_config(config, config_text)
        select_trainable_parameters(model, config)
        state = model_state(model, ParallelMesh()) | optimizer_state(
            model, build_optimizer(model, config.optim), ParallelMesh()
        )
        save(session.directory.checkpoints, 0, state, extra)
    finally:
        session.close()
    return session.directory.path


def first_extra(config: Config, data: DataSplits, **origin: str) -> dict[str, Any]:
    """Return the `extra` of a trainer's checkpoint of step 0, and where the weights are from."""
    return {
        "step": 0,
        "tokens": 0,
        "config": asdict(config),
        "topology": {
            "world": 1,
            "ep": 1,
            "virtual_ranks": config.parallel.virtual_ranks,
            "micro_batch": batching(config, 1).micro_batch,
        },
        "data": data.fingerprint,
        "guard": StepGuard(config.guard).state_dict(),
        "scaler": None,
        "versions": {"dmoe": dmoe.__version__, "torch": torch.__version__},
    } | origin
