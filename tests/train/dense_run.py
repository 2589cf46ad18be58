"""A run directory with a dense model, as after `dmoe train`, but without the training."""

from __future__ import annotations

from pathlib import Path

import torch

from dmoe.checkpoint import save
from dmoe.config.load import load
from dmoe.config.schema import Config
from dmoe.distributed.mesh import ParallelMesh
from dmoe.distributed.state_dict import model_state
from dmoe.models.base import Model
from dmoe.runs.directory import RunDir
from dmoe.train.tasks import task_of
from tests.tiny import tiny

__all__ = ["DENSE", "SPARSE", "dense_run", "weights"]

DENSE = ("model.moe_every=0", "model.dense_dim=24", "model.init_std=0.3")
SPARSE = ("model.dense_dim=24", "model.init_std=0.3", "moe.balance.switch=0", "moe.balance.z=0")


def weights(config: Config) -> Model:
    """Return a model whose norms are not all ones, as after training."""
    model = task_of(config).build_model()
    model.initialize(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()))
    return model


def dense_run(path: Path, *overrides: str) -> RunDir:
    config, run = tiny(*DENSE, *overrides), RunDir(path)
    run.create(None)
    run.write_config(config, "")
    save(run.checkpoints, 5, model_state(weights(config), ParallelMesh()), {"step": 5})
    assert load(path / "resolved.yaml") == config
    return run
