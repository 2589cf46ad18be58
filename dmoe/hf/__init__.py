"""Published models of Hugging Face."""

from dmoe.hf.plugin import ExpertCounts, expert_counts, register

__all__ = ["ExpertCounts", "expert_counts", "register"]
