"""AdamW and its parameter groups."""

from __future__ import annotations

import torch
from torch import nn

from dmoe.config.schema import OptimConfig

__all__ = ["build"]

NO_DECAY = ("norm", "embedding", "router")


def build(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Two groups: matrices decay; vectors, norms, embeddings and routers do not. Fused: one kernel for all tensors of a group."""
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or any(part in name for part in NO_DECAY)
            (rest if plain else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
