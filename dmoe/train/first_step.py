"""Checks on the first step, when being wrong is still cheap."""

from __future__ import annotations

import math

from dmoe.config.errors import NumbersError
from dmoe.distributed.full_tensors import norm
from dmoe.train.engine import Engine
from dmoe.train.step import StepResult


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
        if result.updated and learning and not any(norm(moment) > 0 for moment in learning):
            raise NumbersError(
                f"the router of MoE layer {layer.layer} got no gradient in the first step: it would never learn"
            )
    drawn = engine.config.modular.core is None  # else it is not guessing, it goes on
    if drawn and not 0.5 * guess < loss < 1.5 * guess:
        return f"the first loss is {loss:.2f}, guessing is {guess:.2f}: check model.init_std and the data"
    return None
