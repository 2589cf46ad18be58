"""AdamW and its parameter groups."""

from __future__ import annotations

import torch
from torch import nn

from dmoe.config.schema import OptimConfig

__all__ = ["build"]

NO_DECAY = ("norm", "embedding", "router", "constant", "modular.experts.l", "modular.experts.vector")


def build(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Matrices decay; vectors, norms, embeddings, routers and constant experts do not; nor do scaling modules (zero would switch
    the network off) and prompts.  Fused: one kernel for all tensors of a group,
    so what FSDP2 shards over different ranks makes groups of its own."""
    by_kind: dict[tuple[object, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or any(part in name for part in NO_DECAY)
            sharded_over = getattr(parameter, "device_mesh", None)
            by_kind.setdefault((sharded_over, 0.0 if plain else config.weight_decay), []).append(parameter)
    groups = [{"params": parameters, "weight_decay": decay} for (_, decay), parameters in by_kind.items()]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
