"""AdamW with its parameter groups, and the learning rate.

The learning rate is a pure function of the step: there is no scheduler state to save, and none
that a wrapper could advance twice.
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
"""Parts of the names of parameters without weight decay, beside all vectors."""


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW; weight decay applies to matrices only.

    Without decay: vectors, norms, embeddings, routers, constant experts, scaling modules (at zero
    they would switch the network off) and prompts. The fused implementation needs all parameters
    of a group on one device mesh, so what FSDP2 shards over different ranks is in groups of its
    own.
    """
    params: dict[tuple[object, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            no_decay = parameter.ndim < 2 or any(part in name for part in NO_DECAY)
            weight_decay = 0.0 if no_decay else config.weight_decay
            device_mesh = getattr(parameter, "device_mesh", None)
            params.setdefault((device_mesh, weight_decay), []).append(parameter)
    groups = [
        {"params": group, "weight_decay": weight_decay}
        for (_, weight_decay), group in params.items()
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Return the learning rate of optimizer step `step`, from 0, of `num_steps`.

    Linear warm-up over `warmup` steps to `lr`, then decay to `lr * min_lr_ratio` at the last step:
    `cosine` or `linear` over all steps, `wsd` (warm-up, stable, decay; MiniCPM) linear over the
    last `decay_fraction` of the steps, `constant` none.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    factor = _decay_factor(step, num_steps, config)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * factor)


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
