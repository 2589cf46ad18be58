"""What an expert computes. `build` makes the routed experts of a layer."""

from __future__ import annotations

from dmoe.config.schema import ExpertsConfig
from dmoe.moe.experts.base import Experts
from dmoe.moe.experts.grouped_mlp import FeedForward, MLPExperts
from dmoe.moe.experts.heterogeneous import HeterogeneousExperts
from dmoe.moe.experts.zero_cost import ZeroCost

__all__ = ["Experts", "FeedForward", "HeterogeneousExperts", "MLPExperts", "ZeroCost", "build"]


def build(
    config: ExpertsConfig, dim: int, expert_dim: int, num_experts: int, out_dim: int
) -> Experts:
    """Experts of the shapes that `config` gives, or `num_experts` of one hidden width `expert_dim`."""
    if config.shapes:
        return HeterogeneousExperts(config.kind, dim, config.shapes, out_dim)
    return MLPExperts(config.kind, dim, expert_dim, num_experts, out_dim)
