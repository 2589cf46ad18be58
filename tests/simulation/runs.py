"""Runs whose kept assignments are seen where the layers decide them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import dmoe
from dmoe.moe import base_layer
from dmoe.moe.capacity import apply_capacity
from tests.tiny import tiny

BASE = (
    *("train.steps=3", "train.log_every=1", "train.sample_tokens=0", "alerts.drop_rate=1"),
    *("moe.capacity.factor=1", "tracking.trackers=[]"),
)


def train(folder: Path, *overrides: str) -> tuple[list[float], Tensor]:
    """Train; return the losses, and the experts that compute this rank's assignments.

    Of the latter: int64 [forwards, L, T, K], -1 where it was dropped; the forwards of training in
    their order.
    """
    kept: list[Tensor] = []

    def seen(routing: Any, shape: Any, *more: Any) -> Any:
        plan = apply_capacity(routing, shape, *more)
        if torch.is_grad_enabled():
            kept.append(plan.expert_TK.masked_fill(~plan.is_kept_TK, -1))
        return plan

    config = tiny(*BASE, f"train.run_dir={folder}", *overrides)
    with mock.patch.object(base_layer, "apply_capacity", seen):
        run = dmoe.train(config, quiet=True)
    losses = [line["loss"] for line in run.metrics.of("train")]
    layers = config.model.layers
    of_steps = torch.stack(kept[layers:])  # the first forward is the engine's warm-up
    return losses, of_steps.view(-1, layers, *of_steps.shape[1:])
