"""Runs whose kept assignments are seen where the layers decide them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import dmoe
from dmoe.moe import layer
from dmoe.moe.capacity import apply_capacity
from tests.tiny import tiny

BASE = (
    *("train.steps=3", "train.log_every=1", "train.sample_tokens=0", "alerts.drop_rate=1"),
    *("moe.capacity.factor=1", "tracking.trackers=[]"),
)
LAYERS = 2


def train(folder: Path, *overrides: str) -> tuple[list[float], Tensor]:
    """Train; return the losses, and which assignments of this rank were kept.

    Of the latter: bool [forwards, L, T, K], the forwards of training in their order.
    """
    kept: list[Tensor] = []

    def seen(routing: Any, shape: Any, *more: Any) -> Any:
        plan = apply_capacity(routing, shape, *more)
        if torch.is_grad_enabled():
            kept.append(plan.is_kept_TK.clone())
        return plan

    config = tiny(*BASE, f"train.run_dir={folder}", *overrides)
    with mock.patch.object(layer, "apply_capacity", seen):
        run = dmoe.train(config, quiet=True)
    losses = [line["loss"] for line in run.metrics.of("train")]
    of_steps = torch.stack(kept[LAYERS:])  # the first forward is the engine's warm-up
    return losses, of_steps.view(-1, LAYERS, *of_steps.shape[1:])
