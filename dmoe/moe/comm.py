"""TODO docstring."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class DataParallelComm(Protocol):
    """Sums over all data ranks. `distributed/peers.py` implements it with collectives; `Alone` without any."""

    size: int
    rank: int

    def sum(self, value: Tensor) -> Tensor:
        """`value` summed over the data ranks; carries no gradient. One all-reduce."""
        ...

    def gather(self, value: Tensor) -> Tensor:
        """[size, ...]: every rank's `value`, of equal shape everywhere; carries no gradient. One all-gather."""
        ...


class NoComm:
    """One data rank: every sum is the value itself."""

    size = 1
    rank = 0

    def sum(self, value: Tensor) -> Tensor:
        return value.detach()

    def gather(self, value: Tensor) -> Tensor:
        return value.detach().unsqueeze(0)
