"""What an expert computes."""

from __future__ import annotations

from dmoe.moe.experts.mlp import FeedForward, MLPExperts

__all__ = ["FeedForward", "MLPExperts"]
