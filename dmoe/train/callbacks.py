"""Callbacks: code of one's own at the events of a run, which cannot desynchronise the ranks.

A callback is called on every rank, with numbers that are reduced over all ranks and therefore
equal. What it raises on one rank ends the run on all of them, with one sentence, and what it
returns can stop the run on all: after every step the ranks agree with one reduction of two numbers,
whichever have callbacks (none if no rank has).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dmoe.checkpoint.manifest import step_name
from dmoe.config.errors import DmoeError
from dmoe.distributed.gradients import all_reduce_max, all_reduce_sum
from dmoe.observability.logger import RunLogger
from dmoe.runs.metrics_log import START_EVENTS
from dmoe.train.engine import Engine
from dmoe.train.signals import StopRequested

MAX_TEXT = 400
"""Bytes of an error that the other ranks get."""


class Callback:
    """Base class: override what you need. Every method is called on every rank."""

    def on_train_begin(self, run: Path, step: int) -> None:
        """Before the first step. `run`: the run directory. `step`: steps done, if it resumes."""

    def on_step_end(self, step: int, metrics: Mapping[str, Any]) -> bool | None:
        """After each optimizer step, from 1. Return True, on any rank, to save and stop the run.

        `metrics`: loss, grad_norm, clip_factor, updated, lr and tokens; in a logged step (
        `train.log_every`) everything that metrics.jsonl has.
        """

    def on_evaluate(self, step: int, metrics: Mapping[str, Any]) -> None:
        """After each evaluation. `metrics`: those of its line in metrics.jsonl."""

    def on_save(self, step: int, path: Path) -> None:
        """After each checkpoint that is complete; written in the background, at a later step."""

    def on_train_end(self, step: int) -> None:
        """After the last step, or after a stop; the state is saved."""


class Callbacks:
    """The callbacks of one rank, and the agreement of all ranks on what they did."""

    def __init__(self, callbacks: Sequence[Callback], engine: Engine, logger: RunLogger) -> None:
        """Ask whether any rank has callbacks: they may differ. Collective."""
        self.callbacks, self.run, self.stop = callbacks, logger.run, False
        logger.listener = self.on_event
        self.mesh, self.device = engine.mesh, engine.process.device
        self.num_steps = engine.config.train.steps
        self.error: Exception | None = None
        self.text = ""
        self.active = self._maximum(float(bool(callbacks)))[0] > 0

    def on_event(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Call the callbacks of a line of metrics.jsonl. Collective at the start and the end."""
        if event in START_EVENTS:
            self.call("on_train_begin", self.run.path, step)
            self.agree()
        elif event == "eval":
            self.call("on_evaluate", step, values)
        elif event == "checkpoint":
            self.call("on_save", step, self.run.checkpoints / step_name(step))
        elif event == "end" and not values.get("failed"):
            self.call("on_train_end", step)
            self.agree()

    def end_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Call `on_step_end`, then agree. Collective.

        Raises:
            StopRequested: on every rank, if a callback of any has asked to stop before the end.
        """
        self.call("on_step_end", step, metrics)
        if self.agree() and step < self.num_steps:
            raise StopRequested

    def call(self, event: str, *args: Any) -> None:
        """Call `event` of each callback. An error is kept until `agree`; no collective."""
        for callback in self.callbacks if self.error is None else ():
            try:
                self.stop |= getattr(callback, event)(*args) is True
            except Exception as error:
                self.error, reason = error, " ".join(str(error).split())
                where = f" on rank {self.mesh.rank}" if self.mesh.world_size > 1 else ""
                name = f"{type(callback).__name__}.{event}"
                self.text = f"callback {name} raised {type(error).__name__}{where}: {reason}"
                return

    def agree(self) -> bool:
        """Return whether a callback of any rank has asked to stop. Collective.

        Raises:
            DmoeError: on every rank, if a callback of any rank has raised; the lowest of them.
        """
        if not self.active:
            return False
        failed = 0.0 if self.error is None else float(self.mesh.world_size - self.mesh.rank)
        stop, first = self._maximum(float(self.stop), failed)
        if first:
            owner = self.mesh.world_size - int(first)
            raise DmoeError(self._broadcast(owner)) from self.error
        return stop > 0

    def _maximum(self, *values: float) -> list[float]:
        return all_reduce_max(self._tensor(values), self.mesh).tolist()

    def _broadcast(self, owner: int) -> str:
        own = self.text.encode()[:MAX_TEXT] if owner == self.mesh.rank else b""
        text = self._tensor([*own, *bytes(MAX_TEXT - len(own))])
        values = all_reduce_sum(text, self.mesh).tolist()
        return bytes(map(int, values)).rstrip(b"\0").decode(errors="ignore")

    def _tensor(self, values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.device)
