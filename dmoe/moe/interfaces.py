"""What a layer with experts shows to whoever spreads them over ranks: the mixture layer, and modules beside a frozen network.

The other data ranks, as far as a layer needs them: for losses over the global batch.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn

from dmoe.moe.comm import DataParallelComm
from dmoe.moe.dispatch import Dispatcher
from dmoe.moe.routers.base import RouterModule


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
