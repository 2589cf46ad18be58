"""How unequally the router loads the ranks: what a step waits for, and what memory must hold.

Letters: E experts, P = EP ranks, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

DRAWS = 512


@dataclass(frozen=True)
class Load:
    """Loads of experts, log-normal with standard deviation `sigma` of their logarithm.

    Or measured ones: `measured`, rows of each rank per (step, layer), [n, P].
    """

    experts: int
    top_k: int
    capacity: float | None
    sigma: float = 0.0
    source: str = "balanced"

    @cached_property
    def share_NE(self) -> np.ndarray:
        """Load of each expert over the mean, in `DRAWS` layers and steps."""
        generator = np.random.default_rng(0)
        drawn = np.exp(self.sigma * generator.standard_normal((DRAWS, self.experts)))
        # an expert gets at most one row per token
        share: np.ndarray = drawn / drawn.mean(1, keepdims=True)
        capped: np.ndarray = np.minimum(share, self.experts / self.top_k)
        return capped

    @property
    def kept_NE(self) -> np.ndarray:
        """The same after drops: an expert computes at most `capacity` times the mean."""
        return self.share_NE if self.capacity is None else np.minimum(self.share_NE, self.capacity)

    @property
    def drop_rate(self) -> float:
        """Share of the assignments that have no slot."""
        return float(1 - self.kept_NE.sum() / self.share_NE.sum())

    def ranks(self, ep: int) -> np.ndarray:
        """Return the rows of the rank with the most over the mean of a balanced router, [N]."""
        if ep == 1 or self.experts % ep:
            return np.ones(DRAWS)
        per_rank: np.ndarray = self.kept_NE.reshape(DRAWS, ep, -1).mean(2)
        most: np.ndarray = per_rank.max(1)
        return most

    def mean_max(self, ep: int) -> float:
        """Return the load of the slowest rank, in the mean: each layer waits for it."""
        return round(float(self.ranks(ep).mean()), 3)

    def p99(self, ep: int) -> float:
        """Return the load that one layer in a hundred exceeds."""
        return round(float(np.quantile(self.ranks(ep), 0.99)), 3)

    def worst(self, ep: int) -> float:
        """Return the load if all tokens go to the experts of one rank."""
        most = min(float(ep), self.experts / self.top_k)
        return most if self.capacity is None else min(most, self.capacity)
