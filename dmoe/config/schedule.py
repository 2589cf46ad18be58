"""The learning-rate schedule in words, and what of it never happens in a run of its length.

The schedule itself is `learning_rate` in dmoe/train/engine.py. Imports no torch.
"""

from __future__ import annotations

from dmoe.config.schema import OptimConfig


def decay_steps(optim: OptimConfig, steps: int) -> int:
    """Return the number of steps in which the learning rate falls; 0 for one that stays."""
    if optim.schedule == "constant":
        return 0
    start = optim.warmup
    if optim.schedule == "wsd":
        start = max(start, round(steps * (1 - optim.decay_fraction)))
    # One step cannot fall: it is at the peak.
    return steps - start if steps - start > 1 else 0


def describe_schedule(optim: OptimConfig, steps: int) -> str:
    """Describe the learning rate of a run of `steps` steps in one sentence."""
    if optim.warmup > steps:
        return (
            f"Learning rate: linear warm-up over {optim.warmup:,} steps, of which the run has "
            f"{steps:,}: it ends at {_last_of_warmup(optim, steps):g} and never reaches "
            f"{optim.lr:g}."
        )
    start = f"{optim.lr:g} from the first step"
    if optim.warmup:
        start = f"linear warm-up over {_steps(optim.warmup)} to {optim.lr:g}"
    falling = decay_steps(optim, steps)
    if not falling:
        if optim.warmup >= steps - 1 and optim.schedule != "constant":
            return f"Learning rate: {start}; training ends before any decay, at step {steps:,}."
        return f"Learning rate: {start}, then constant to the end, step {steps:,}."
    end = f"{optim.min_lr_ratio * optim.lr:g} at step {steps:,}"
    shapes = {
        "cosine": f"then a half cosine to {end}",
        "linear": f"then linear to {end}",
        "wsd": f"then constant, and over the last {_steps(falling)} linear to {end}",
    }
    return f"Learning rate: {start}, {shapes[optim.schedule]}."


def schedule_remarks(optim: OptimConfig, steps: int) -> list[str]:
    """List what the settings of the schedule say and a run of `steps` steps does not do."""
    if optim.warmup > steps:
        return [
            f"optim.warmup={optim.warmup}: the run has {steps} steps, so the learning rate rises "
            f"to the end, to {_last_of_warmup(optim, steps):g}, and never reaches "
            f"optim.lr={optim.lr:g}; lower optim.warmup, or raise train.steps"
        ]
    falling = decay_steps(optim, steps)
    if optim.schedule == "wsd":
        asked = round(steps * optim.decay_fraction)
        if falling < asked:
            return [
                f"optim.warmup={optim.warmup}: leaves {_steps(falling)} for the decay, not the "
                f"{asked} of optim.decay_fraction={optim.decay_fraction:g}; lower one of them"
            ]
        if not falling and optim.min_lr_ratio < 1:
            return [
                f"optim.decay_fraction={optim.decay_fraction:g}: of {steps} steps none is left "
                "for the decay of optim.schedule=wsd; raise it, or use optim.schedule=constant"
            ]
    return []


def _last_of_warmup(optim: OptimConfig, steps: int) -> float:
    return optim.lr * steps / optim.warmup


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count:,} steps"
