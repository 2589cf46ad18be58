"""The other data ranks, as far as a layer needs them: for losses over the global batch."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["Alone", "Peers"]


class Peers(Protocol):
    """Sums over all data ranks. `distributed/peers.py` implements it with collectives; `Alone` without any."""

    size: int

    def sum(self, value: Tensor) -> Tensor:
        """`value` summed over the data ranks; carries no gradient. One all-reduce."""
        ...


class Alone:
    """One data rank: every sum is the value itself."""

    size = 1

    def sum(self, value: Tensor) -> Tensor:
        return value.detach()
