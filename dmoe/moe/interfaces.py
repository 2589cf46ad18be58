"""What a layer with experts shows to whoever spreads them over ranks: the mixture layer, and modules beside a frozen network.

The other data ranks, as far as a layer needs them: for losses over the global batch.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from dmoe.moe.dispatch import Dispatcher
from dmoe.moe.routers.base import RouterModule


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


@runtime_checkable
class ExpertLayer(Protocol):
    """Recognised by its attributes. The parameters and buffers of `experts` differ by EP rank, and nothing else does."""

    experts: nn.Module
    router: RouterModule
    layer: int
    """Names the layer where its exchanges are watched."""
    packed: Dispatcher
    padded: Dispatcher | None
    comm: DataParallelComm

    def shard(self, ep_size: int, ep_rank: int) -> None:
        """Keep only the experts of one of so many ranks."""
        ...
