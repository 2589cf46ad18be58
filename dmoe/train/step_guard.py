"""Step guard: what to do with a step of bad loss or gradient norm, before the optimizer applies it.

All ranks decide from the same reduced values and the same history; no extra collective.

    not finite = loss or gradient norm is not finite
    spike      = loss > mean + max(deviations * std, 0.02 |mean|) of the last `spike_window` losses

Losses of bad steps are not in the history. The floor of 2% keeps the noise of a converged run from
being called a spike.
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
from dmoe.distributed.full_tensors import full_norm, on_device_of
from dmoe.train.engine import Engine
from dmoe.train.step import StepResult

MIN_RELATIVE_SPIKE = 0.02
"""A loss above the mean by less than this fraction of it is no spike, however small the noise."""


class StepHealth(Enum):
    """State of a step's loss and gradient norm; the values are for messages."""

    GOOD = "good"
    NONFINITE = "not finite"
    SPIKE = "a spike"


class StepAction(Enum):
    """Decision on a step; the values are for messages."""

    APPLY = "taken"
    SKIP = "skipped"
    ROLLBACK = "rolled back"
    STOP = "stopped"


class StepGuard:
    """The guard of `guard.*`. Its state is saved in checkpoints, so a resumed run decides alike."""

    def __init__(self, config: GuardConfig, loss_scaling: bool = False) -> None:
        """Start with an empty history.

        `loss_scaling`: fp16 gradients overflow until the loss scale fits. Such a step is skipped,
        whatever `guard.nonfinite` says.
        """
        self.config, self.loss_scaling = config, loss_scaling
        self.losses: deque[float] = deque(maxlen=config.spike_window)
        self.bad_steps = 0
        """Bad steps in a row."""
        self.rollback_step: int | None = None
        """Step that caused the last rollback; until it is passed, a second rollback is no help."""

    @property
    def takes_finite_steps(self) -> bool:
        """True if the next step is taken at any finite loss and norm."""
        return self.config.spike == "warn" and self.bad_steps + 1 < self.config.patience

    def check(self, step: int, loss: float, norm: float) -> tuple[StepHealth, StepAction]:
        """Classify a step and decide what to do with it; add its loss to the history if it is good.

        Args:
            step: number of the optimizer step, from 0.
            loss: mean loss of the global batch, in nats per target.
            norm: global gradient norm.
        """
        health = self._classify(loss, norm)
        if health is StepHealth.GOOD:
            self.losses.append(loss)
            self.bad_steps = 0
            if self.rollback_step is not None and step > self.rollback_step:
                self.rollback_step = None
            return health, StepAction.APPLY
        self.bad_steps += 1
        return health, self._action(health, step)

    def reset_count(self) -> None:
        """Forget the bad steps in a row: the run is at its last checkpoint again."""
        self.bad_steps = 0

    def stop_reason(self) -> str:
        """Return the end of the error message of a run that the guard stops."""
        return (
            f"{self.bad_steps} bad steps in a row, and a restart would reach the same ones: "
            "lower optim.lr, check the data, or see guard.* in the config"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values; Python's floats survive JSON exactly."""
        return {
            "losses": list(self.losses),
            "bad": self.bad_steps,
            "beyond": self.rollback_step,
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore the state of a checkpoint; None, of a version that saved none, resets it.

        `rollback_step` keeps its value if that is larger: the checkpoint that a run rolls back to
        was written before the rollback.
        """
        saved = state or {}
        self.losses.clear()
        self.losses.extend(float(loss) for loss in saved.get("losses", ()))
        self.bad_steps = int(saved.get("bad", 0))
        known = (self.rollback_step, saved.get("beyond"))
        self.rollback_step = max((step for step in known if step is not None), default=None)

    def _classify(self, loss: float, norm: float) -> StepHealth:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return StepHealth.NONFINITE
        return (
            StepHealth.SPIKE if _is_loss_spike(loss, self.losses, self.config) else StepHealth.GOOD
        )

    def _action(self, health: StepHealth, step: int) -> StepAction:
        is_spike = health is StepHealth.SPIKE
        policy: str = self.config.spike if is_spike else self.config.nonfinite
        if self.loss_scaling and not is_spike:
            policy = "skip"
        impatient = self.bad_steps >= self.config.patience
        if policy == "stop" or (impatient and is_spike and policy != "rollback"):
            return StepAction.STOP
        if policy == "rollback" or impatient:
            return self._rollback_or_stop(step)
        return StepAction.APPLY if policy == "warn" else StepAction.SKIP

    def _rollback_or_stop(self, step: int) -> StepAction:
        if self.rollback_step is not None:
            return StepAction.STOP
        self.rollback_step = step
        return StepAction.ROLLBACK


def _is_loss_spike(loss: float, losses: Sequence[float], config: GuardConfig) -> bool:
    if len(losses) < max(2, config.spike_window // 4):
        return False
    mean = statistics.fmean(losses)
    deviation = config.spike_deviations * statistics.pstdev(losses, mean)
    return loss - mean > max(deviation, MIN_RELATIVE_SPIKE * abs(mean))


def describe_bad_step(
    step: int, health: StepHealth, action: StepAction, result: StepResult, engine: Engine
) -> str:
    """Return one line on a bad step: what is wrong with it, the decision, and its samples.

    Args:
        step: number of the step, from 0.
        health: what is wrong with it.
        action: what becomes of it, on all ranks.
        result: loss and gradient norm of the step.
        engine: for the size of the global batch.
    """
    global_batch = engine.config.train.global_batch
    first_sample = step * global_batch
    loss = result.totals.loss
    return (
        f"step {step + 1} is {health.value} and {action.value} on all ranks: loss {loss:.4g}, "
        f"gradient norm {result.grad_norm:.4g}, "
        f"samples {first_sample} to {first_sample + global_batch - 1}"
    )


def check_first_step(engine: Engine, result: StepResult) -> str | None:
    """Return a warning if the first loss is far from that of a uniform guess, else None.

    The loss of a uniform guess is the log of the vocabulary size or of the number of classes.
    Under fp16 the first gradients may overflow, since the loss scale is found by trial.

    Raises NumbersError for a first loss or gradient that is not finite, and for a router that gets
    no gradient (NeMo Automodel#2995 trained for months with one).
    """
    loss = result.totals.loss
    guess = math.log(engine.task.num_outputs)
    if not math.isfinite(loss) or not (result.updated or engine.accelerator.scaler is not None):
        raise NumbersError(
            f"the first step gave loss {loss} and gradient norm {result.grad_norm}: "
            "lower optim.lr or use train.precision=fp32"
        )
    for layer in engine.model.moe_layers():
        states = ((p, engine.optimizer.state.get(p, {})) for p in layer.router.parameters())
        moments = [
            on_device_of(weight, state["exp_avg"])
            for weight, state in states
            if state.get("exp_avg") is not None
        ]
        if result.updated and moments and not any(full_norm(moment) > 0 for moment in moments):
            raise NumbersError(
                f"the router of MoE layer {layer.layer} got no gradient in the first step: "
                "it would never learn"
            )
    from_scratch = engine.config.modular.core is None and engine.config.model.source is None
    if from_scratch and not 0.5 * guess < loss < 1.5 * guess:
        return (
            f"the first loss is {loss:.2f}, that of a uniform guess is {guess:.2f}: "
            "check model.init_std and the data"
        )
    return None
