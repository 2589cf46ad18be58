"""Experts: the feed-forward networks of a MoE layer."""

from __future__ import annotations

from dmoe.config.plugin_loader import construct, plugin_class
from dmoe.config.schema import ExpertsConfig
from dmoe.moe.experts.base import Experts
from dmoe.moe.experts.dense import FeedForward
from dmoe.moe.experts.grouped_mlp import MLPExperts
from dmoe.moe.experts.heterogeneous import HeterogeneousExperts
from dmoe.moe.experts.zero_cost import ZeroCost

__all__ = [
    "Experts",
    "FeedForward",
    "HeterogeneousExperts",
    "MLPExperts",
    "ZeroCost",
    "build_experts",
]


def build_experts(
    config: ExpertsConfig, dim: int, expert_dim: int, num_experts: int, out_dim: int
) -> Experts:
    """Build experts of a class of the user's own, of the shapes in `config`, or uniform ones.

    Args:
        config: section `moe.experts`.
        dim: input width D.
        expert_dim: hidden width F of uniform experts.
        num_experts: number of uniform experts, zero-cost ones excluded.
        out_dim: output width M.
    """
    field = "moe.experts.kind"
    if plugin_class(config.kind, field) is not None:
        own: Experts = construct(
            config.kind,
            field,
            *(dim, expert_dim, num_experts, out_dim),
            options=config.options,
            base=Experts,
        )
        return own
    if config.shapes:
        return HeterogeneousExperts(config.kind, dim, config.shapes, out_dim)
    return MLPExperts(config.kind, dim, expert_dim, num_experts, out_dim)
