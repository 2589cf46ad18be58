"""Real gloo ranks for tests: the same processes `dmoe verify` uses."""

from dmoe.distributed.local_ranks import RankError, run_ranks

__all__ = ["RankError", "run_ranks"]
