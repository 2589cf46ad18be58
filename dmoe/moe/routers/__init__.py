"""One router a file; `build` is the registry."""

from __future__ import annotations

from dmoe.config.schema import RouterConfig
from dmoe.moe.routers.top_k import TopKRouter

__all__ = ["TopKRouter", "build"]


def build(config: RouterConfig, dim: int, num_experts: int, top_k: int, layer: int) -> TopKRouter:
    """The router that `config.kind` names, for tokens of width `dim`."""
    return {"top_k": TopKRouter}[config.kind](config, dim, num_experts, top_k)
