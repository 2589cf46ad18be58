"""Gloo ranks for tests, started as `dmoe verify` does."""

from dmoe.distributed.local_ranks import RankError, run_ranks

__all__ = ["RankError", "run_ranks"]
