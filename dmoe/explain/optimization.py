"""Precision, optimizer, schedule."""

from __future__ import annotations

from dmoe.config.schema import OptimConfig
from dmoe.explain.section import Section, count
from dmoe.explain.setting import Setting
from dmoe.train.optim import learning_rate


def describe(setting: Setting) -> Section:
    optim, steps = setting.config.optim, setting.config.train.steps
    first, last = learning_rate(0, steps, optim), learning_rate(steps - 1, steps, optim)
    clip = (
        "no clipping"
        if optim.clip is None
        else f"gradients clipped to a global norm of {optim.clip:g} over all ranks' parameters"
    )
    words = [
        f"Learning rate: {schedule_in_words(steps, optim, last)}",
        f"AdamW, betas {optim.beta1:g} and {optim.beta2:g}, eps {optim.eps:g}; weight decay {optim.weight_decay:g} on matrices, "
        f"none on norms, routers and embeddings; {clip}.",
        f"Matrix products in {setting.precision}{_why(setting)}; weights, optimizer and routing in float32. Every gradient, dense or "
        "expert, is that of the one global mean loss; no factor depends on the number of ranks.",
    ]
    numbers = {
        "schedule": optim.schedule,
        "peak": optim.lr,
        "first": first,
        "last": last,
        "warmup": optim.warmup,
        "steps": steps,
        "precision": setting.precision,
    }
    return Section("optimization", "Optimization", words, numbers)


def schedule_in_words(steps: int, optim: OptimConfig, last: float) -> str:
    warm = (
        f"linear warm-up over {count(optim.warmup, 'step')} to {optim.lr:g}"
        if optim.warmup
        else f"{optim.lr:g} from the first step"
    )
    decaying = round(steps * optim.decay_fraction)
    shapes = {
        "cosine": f"then along a half cosine to {last:g} at step {steps:,}.",
        "linear": f"then along a line to {last:g} at step {steps:,}.",
        "wsd": f"then constant, and over the last {count(decaying, 'step')} along a line to {last:g} at step {steps:,}.",
        "constant": f"then constant to the end, step {steps:,}.",
    }
    return f"{warm}, {shapes[optim.schedule]}"


def _why(setting: Setting) -> str:
    if setting.config.train.precision != "auto":
        return ""
    return " (auto; this machine's answer)" if setting.config.train.device != "cuda" else " (auto)"
