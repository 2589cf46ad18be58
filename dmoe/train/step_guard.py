"""What to do with a step whose numbers are bad, decided before the optimizer sees it.

Every rank judges the same sums (they come out of one reduction) by the same memory, so all decide alike without another word.

    bad  = loss or gradient norm not finite
    high = loss > mean + max(deviations * std, 0.02 * |mean|) of the last `spike_window` good losses

The floor of 2% keeps the noise of a run that has converged from being called a spike. Losses of bad steps are not remembered.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from enum import Enum
from typing import Any

from dmoe.config.errors import NumbersError
from dmoe.config.schema import GuardConfig
from dmoe.distributed.full_tensors import full_norm
from dmoe.train.engine import Engine
from dmoe.train.step import StepResult

FLOOR = 0.02
"""A loss less than this share above the mean is no spike, however calm the run is."""


class StepHealth(Enum):
    GOOD = "good"
    NONFINITE = "not finite"
    SPIKE = "a spike"


class StepAction(Enum):
    APPLY = "taken"
    SKIP = "skipped"
    ROLLBACK = "rolled back"
    STOP = "stopped"


class StepGuard:
    """`guard` in the config. Its memory travels in the checkpoint, so that a resumed run decides as the unbroken one."""

    def __init__(self, config: GuardConfig, scaled: bool = False) -> None:
        self.config, self.scaled = config, scaled
        """`scaled`: under fp16 a gradient overflows now and then until the loss scale fits, which is no fault."""
        self.losses: deque[float] = deque(maxlen=config.spike_window)
        self.bad = 0
        """Bad steps in a row."""
        self.beyond: int | None = None
        """The step that made the run go back; until it is passed, going back again would not help."""

    def check(self, step: int, loss: float, norm: float) -> tuple[StepHealth, StepAction]:
        """What optimizer step number `step`, with this mean loss and gradient norm, is, and what to do. Remembers it."""
        kind = self._kind(loss, norm)
        if kind is StepHealth.GOOD:
            self.losses.append(loss)
            self.bad = 0
            if self.beyond is not None and step > self.beyond:
                self.beyond = None
            return kind, StepAction.APPLY
        self.bad += 1
        return kind, self._action(kind, step)

    def rolled_back(self) -> None:
        """The run is at its last checkpoint again."""
        self.bad = 0

    def state(self) -> dict[str, Any]:
        """Plain JSON that comes back exactly: Python writes the shortest text that reads back to the same float."""
        return {"losses": list(self.losses), "bad": self.bad, "beyond": self.beyond}

    def restore(self, state: dict[str, Any] | None) -> None:
        """From a checkpoint; None, of a version that kept none, forgets everything. But that the run has gone back stays known: the
        checkpoint it goes back to was written before."""
        saved = state or {}
        self.losses.clear()
        self.losses.extend(float(loss) for loss in saved.get("losses", ()))
        self.bad = int(saved.get("bad", 0))
        self.beyond = max(
            (step for step in (self.beyond, saved.get("beyond")) if step is not None), default=None
        )

    def _kind(self, loss: float, norm: float) -> StepHealth:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return StepHealth.NONFINITE
        return StepHealth.SPIKE if _is_spike(loss, self.losses, self.config) else StepHealth.GOOD

    def _action(self, kind: StepHealth, step: int) -> StepAction:
        policy = (
            self.config.spike
            if kind is StepHealth.SPIKE
            else "skip"
            if self.scaled
            else self.config.nonfinite
        )
        tired = self.bad >= self.config.patience
        if policy == "stop" or (tired and kind is StepHealth.SPIKE and policy != "rollback"):
            return StepAction.STOP
        if policy == "rollback" or tired:
            return self._back(step)
        return StepAction.APPLY if policy == "warn" else StepAction.SKIP

    def _back(self, step: int) -> StepAction:
        if self.beyond is not None:
            return StepAction.STOP
        self.beyond = step
        return StepAction.ROLLBACK


def _is_spike(loss: float, losses: Sequence[float], config: GuardConfig) -> bool:
    if len(losses) < max(2, config.spike_window // 4):
        return False
    mean = statistics.fmean(losses)
    return loss - mean > max(
        config.spike_deviations * statistics.pstdev(losses, mean), FLOOR * abs(mean)
    )


def check_first_step(engine: Engine, result: StepResult, outputs: int, targets: int) -> str | None:
    """A remark if the first loss is far from that of guessing (log of the vocabulary, or of the classes), else None.

    Raises NumbersError for a first loss or gradient that is not finite, and for a router that the loss does not reach
    (NeMo Automodel#2995 trained for months with one). Under fp16 the first gradients may overflow: the loss scale is found by trying.
    """
    loss, guess = result.totals.loss_sum / targets, math.log(outputs)
    scaled = engine.accelerator.scaler is not None
    if not math.isfinite(loss) or not (result.updated or scaled):
        raise NumbersError(
            f"the first step gave loss {loss} and gradient norm {result.grad_norm}: lower optim.lr or use train.precision=fp32"
        )
    for layer in engine.model.moe_layers():
        moments = [
            engine.optimizer.state.get(parameter, {}).get("exp_avg")
            for parameter in layer.router.parameters()
        ]
        learning = [moment for moment in moments if moment is not None]
        if result.updated and learning and not any(full_norm(moment) > 0 for moment in learning):
            raise NumbersError(
                f"the router of MoE layer {layer.layer} got no gradient in the first step: it would never learn"
            )
    drawn = engine.config.modular.core is None  # else it is not guessing, it goes on
    if drawn and not 0.5 * guess < loss < 1.5 * guess:
        return f"the first loss is {loss:.2f}, guessing is {guess:.2f}: check model.init_std and the data"
    return None
