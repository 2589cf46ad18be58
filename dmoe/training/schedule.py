"""The learning rate as a pure function of the step: nothing to save, nothing that a wrapper can advance twice."""

from __future__ import annotations

import math

from dmoe.config.schema import OptimConfig

__all__ = ["learning_rate"]


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of optimizer step `step` (0-based) of `steps`.

    A linear warm-up over `warmup` steps to `lr`, then down to `lr * min_lr_ratio` at the last step: along a half cosine, a line,
    or (wsd: warm-up, stable, decay; MiniCPM) a line over the last `decay_fraction` of the steps only; `constant` stays.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * _height(step, steps, config))


def _height(step: int, steps: int, config: OptimConfig) -> float:
    """1 at the peak, 0 at the last step."""
    if config.schedule == "constant":
        return 1.0
    start = max(config.warmup, round(steps * (1 - config.decay_fraction))) if config.schedule == "wsd" else config.warmup
    progress = min(1.0, max(0.0, (step - start) / max(1, steps - 1 - start)))
    return 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0 - progress
