"""AdamW and its parameter groups.

The learning rate as a pure function of the step: nothing to save, nothing that a wrapper can advance twice.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from dmoe.config.schema import OptimConfig

NO_DECAY = (
    "norm",
    "embedding",
    "router",
    "constant",
    "modular.experts.l",
    "modular.experts.vector",
)


def build(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Matrices decay; vectors, norms, embeddings, routers and constant experts do not; nor do scaling modules (zero would switch
    the network off) and prompts.  Fused: one kernel for all tensors of a group,
    so what FSDP2 shards over different ranks makes groups of its own."""
    by_kind: dict[tuple[object, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or any(part in name for part in NO_DECAY)
            sharded_over = getattr(parameter, "device_mesh", None)
            by_kind.setdefault((sharded_over, 0.0 if plain else config.weight_decay), []).append(
                parameter
            )
    groups = [
        {"params": parameters, "weight_decay": decay} for (_, decay), parameters in by_kind.items()
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of optimizer step `step` (0-based) of `steps`.

    A linear warm-up over `warmup` steps to `lr`, then down to `lr * min_lr_ratio` at the last step: along a half cosine, a line,
    or (wsd: warm-up, stable, decay; MiniCPM) a line over the last `decay_fraction` of the steps only; `constant` stays.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    return config.lr * (
        config.min_lr_ratio + (1 - config.min_lr_ratio) * _height(step, steps, config)
    )


def _height(step: int, steps: int, config: OptimConfig) -> float:
    """1 at the peak, 0 at the last step."""
    if config.schedule == "constant":
        return 1.0
    start = (
        max(config.warmup, round(steps * (1 - config.decay_fraction)))
        if config.schedule == "wsd"
        else config.warmup
    )
    progress = min(1.0, max(0.0, (step - start) / max(1, steps - 1 - start)))
    return (
        0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0 - progress
    )
