"""Saving and resuming a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import dmoe
from dmoe.config.errors import CheckpointError
from dmoe.data import Data
from dmoe.distributed.checkpoint import layout, store
from dmoe.distributed.state import model_state, optimizer_state, share_step
from dmoe.training.engine import Engine
from dmoe.training.run_dir import RunDir

__all__ = ["load", "resume", "save", "training_state"]


def save(engine: Engine, data: Data, run: RunDir, step: int) -> None:
    """Write the state after `step` steps, then forget all but the last `checkpoint.keep` complete checkpoints. Collective."""
    store.save(run.checkpoints, step, training_state(engine), _extra(engine, data, step), group=engine.topology.control)
    if engine.world.is_main:
        layout.prune(run.checkpoints, engine.config.checkpoint.keep)


def resume(engine: Engine, data: Data, run: RunDir) -> int:
    """Load the newest whole checkpoint of `run`, at whatever world or EP size it was written; the number of steps done, 0 for none.

    The data order, the schedule and all noise are functions of the step, so nothing else has to be restored. Collective.
    """
    path = store.find_latest(run.checkpoints, group=engine.topology.control)
    if path is None:
        return 0
    extra = store.peek(path).extra
    if extra.get("data") != data.fingerprint:
        raise CheckpointError(
            f"{path} was trained on other data (source, tokenizer, seq_len or holdout): give the same, or another train.run_dir"
        )
    return int(load(engine, path)["step"])


def load(engine: Engine, path: Path) -> dict[str, Any]:
    """Fill the weights and the optimizer's state from the checkpoint at `path`; its `extra`. Collective."""
    state = training_state(engine)
    extra = store.load(path, state, group=engine.topology.control)
    if "optim.step" in state:
        share_step(engine.optimizer, state["optim.step"])
    return extra


def training_state(engine: Engine) -> dict[str, torch.Tensor]:
    return model_state(engine.model, engine.topology) | optimizer_state(engine.model, engine.optimizer, engine.topology)


def _extra(engine: Engine, data: Data, step: int) -> dict[str, Any]:
    config = engine.config
    return {
        "step": step,
        "tokens": step * config.train.global_batch * config.data.seq_len,
        "config": asdict(config),
        "topology": {"world": engine.world.size, "ep": engine.topology.ep, "virtual_ranks": config.parallel.virtual_ranks},
        "data": data.fingerprint,
        "versions": {"dmoe": dmoe.__version__, "torch": torch.__version__},
    }
