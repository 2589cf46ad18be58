"""A `dmoe.Model` of one's own, and callbacks, for the tests of `dmoe.train`."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dmoe


class Bigram(dmoe.Model):
    """Predicts a token from the one before it."""

    def __init__(self, config: dmoe.Config) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.out = nn.Embedding(256, 16), nn.Linear(16, 256)
        self.moe = dmoe.MoE.from_config(config.moe, 16)

    def initialize(self, seed: int) -> None:
        self.moe.initialize(seed)

    def forward(
        self,
        input: Tensor,
        target: Tensor | None = None,
        context: dmoe.TokenContext | None = None,
        *,
        return_logits: bool = False,
    ) -> dmoe.ModelOutput:
        x = self.embedding(input)
        found = self.moe(x, context or dmoe.TokenContext())
        logits = self.out(x + found.y)
        out = dmoe.ModelOutput(logits, None, [found.aux], [found.stats])
        if target is not None:
            losses = dmoe.token_losses(logits, target, per_token=not self.training)
            out.loss_sum, out.loss_T, out.correct_T = losses
        return out


class Log(dmoe.Callback):
    """Notes every event; raises, stops or sends a signal at one of them."""

    def __init__(self, fails: str = "", stops: int = 0, signals: int = 0) -> None:
        self.seen, self.fails, self.stops, self.signals = list[Any](), fails, stops, signals

    def note(self, event: str, *values: Any) -> None:
        self.seen.append((event, *values))
        if event == self.fails:
            raise ValueError("out\nof budget")

    def on_train_begin(self, run: Path, step: int) -> None:
        self.note("begin", run.name, step)

    def on_step_end(self, step: int, metrics: Mapping[str, Any]) -> bool:
        if step == self.signals:
            os.kill(os.getpid(), signal.SIGTERM)
        self.note("step", step, metrics["loss"], metrics["grad_norm"], metrics["lr"])
        return step == self.stops

    def on_evaluate(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.note("evaluate", step, metrics["loss"])

    def on_save(self, step: int, path: Path) -> None:
        assert path.is_dir()
        self.note("save", step)

    def on_train_end(self, step: int) -> None:
        self.note("end", step)
