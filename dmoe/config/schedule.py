"""The learning rate of each step, also in words, and what of it a run is too short for.

A pure function of the step: there is no scheduler state to save, and none that a wrapper could
advance twice. Imports no torch.
"""

from __future__ import annotations

import math
from typing import Any

from dmoe.config.errors import ConfigError
from dmoe.config.plugin_loader import construct
from dmoe.config.plugins import describe, label, parse
from dmoe.config.schema import OptimConfig


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Return the learning rate of optimizer step `step`, from 0, of `num_steps`.

    Linear warm-up over `warmup` steps to `lr`, then decay to `lr * min_lr_ratio` at the last step:
    `cosine` or `linear` over all steps, `wsd` (warm-up, stable, decay; MiniCPM) linear over the
    last `decay_fraction` of the steps, `constant` none. `inverse_sqrt` (Vaswani et al. 2017) is
    `lr * max(sqrt(warmup / (step + 1)), min_lr_ratio)` and knows no last step. A schedule of the
    user's own decides about all steps, those of the warm-up too.
    """
    if parse(config.schedule) is not None:
        return _own_rate(step, num_steps, config)
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "inverse_sqrt":
        return config.lr * max(math.sqrt(max(1, config.warmup) / (step + 1)), config.min_lr_ratio)
    factor = _decay_factor(step, num_steps, config)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * factor)


def own_schedule(num_steps: int, config: OptimConfig) -> Any:
    """Construct the schedule of the user's own, which has `rate(step)`."""
    return construct(
        config.schedule,
        "optim.schedule",
        config,
        num_steps,
        options=config.schedule_options,
        methods=("rate",),
    )


def _own_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    rate = float(own_schedule(num_steps, config).rate(step))
    if not (math.isfinite(rate) and rate >= 0):
        allowed = f"gives {rate} for step {step}; a learning rate is finite and not negative"
        raise ConfigError("optim.schedule", label(config.schedule), allowed, "correct rate()")
    return rate


def _decay_factor(step: int, num_steps: int, config: OptimConfig) -> float:
    """Return 1 at the peak, 0 at the last step."""
    if config.schedule == "constant":
        return 1.0
    decay_start = config.warmup
    if config.schedule == "wsd":
        decay_start = max(config.warmup, round(num_steps * (1 - config.decay_fraction)))
    progress = min(1.0, max(0.0, (step - decay_start) / max(1, num_steps - 1 - decay_start)))
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0 - progress


def decay_steps(optim: OptimConfig, steps: int) -> int:
    """Return the number of steps in which the learning rate falls; 0 for one that stays."""
    if optim.schedule == "constant" or parse(optim.schedule) is not None:
        return 0
    start = optim.warmup
    if optim.schedule == "wsd":
        start = max(start, round(steps * (1 - optim.decay_fraction)))
    if optim.schedule == "inverse_sqrt":
        # it falls from the first step after the warm-up, and from the second without one
        return steps - max(start, 1) if steps > max(start, 1) else 0
    # One step cannot fall: it is at the peak.
    return steps - start if steps - start > 1 else 0


def describe_schedule(optim: OptimConfig, steps: int) -> str:
    """Describe the learning rate of a run of `steps` steps in one sentence."""
    if parse(optim.schedule) is not None:
        return f"Learning rate: by {describe(optim.schedule, optim.schedule_options)}."
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
    lowest = optim.min_lr_ratio
    if optim.schedule == "inverse_sqrt":
        lowest = max(lowest, math.sqrt(max(1, optim.warmup) / steps))
    end = f"{lowest * optim.lr:g} at step {steps:,}"
    shapes = {
        "cosine": f"then a half cosine to {end}",
        "linear": f"then linear to {end}",
        "inverse_sqrt": f"then with sqrt({max(1, optim.warmup):,} / step) to {end}",
        "wsd": f"then constant, and over the last {_steps(falling)} linear to {end}",
    }
    return f"Learning rate: {start}, {shapes[optim.schedule]}."


def schedule_remarks(optim: OptimConfig, steps: int) -> list[str]:
    """List what the settings of the schedule say and a run of `steps` steps does not do."""
    if parse(optim.schedule) is not None:
        return []
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


def describe_optimizer(optim: OptimConfig) -> list[str]:
    """Describe the optimizer, clipping, and the parameter groups with settings of their own."""
    clip = "no gradient clipping"
    if optim.clip is not None:
        clip = f"gradients clipped to a global norm of {optim.clip:g} over all parameters"
    kind = f"AdamW, betas {optim.beta1:g} and {optim.beta2:g}, eps {optim.eps:g}"
    if optim.kind == "muon":
        kind = (
            f"Muon, momentum {optim.momentum:g}, on each matrix of attention, feed-forwards and "
            f"experts, of every expert on its own; on all other parameters {kind}"
        )
    elif optim.kind != "adamw":
        kind = describe(optim.kind, optim.options)
    if optim.moments == "bf16":
        kind += ", moments in bfloat16 with stochastic rounding"
    if optim.offload:
        kind += ", moments in the main memory of the host"
    return [
        f"Optimizer: {kind}; weight "
        f"decay {optim.weight_decay:g} on matrices, none on norms, routers and embeddings; {clip}.",
        *(
            f"Own settings of {pattern}: {', '.join(f'{name} {v:g}' for name, v in group.items())}."
            for pattern, group in optim.groups.items()
        ),
    ]
