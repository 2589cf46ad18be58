"""What a layer's exchanges take, for whoever measures a step: seconds inside the all-to-alls, and bytes that leave this rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

__all__ = ["CommTimer"]

IDLE: AbstractContextManager[None] = nullcontext()


@dataclass
class CommTimer:
    """Stands still until it is given a clock. Counts forward and backward, and what is computed again, alike: it is what happened."""

    clock: Callable[[], float] | None = None
    """Seconds. On an accelerator it must wait for the device, or the time of the exchange would fall to whoever waits next."""
    seconds: float = 0.0
    """Waiting for the other ranks included: that is what an exchange costs the step."""
    sent_bytes: int = 0
    """To other ranks; what a rank sends to itself does not travel."""

    def start(self, clock: Callable[[], float]) -> None:
        self.clock, self.seconds, self.sent_bytes = clock, 0.0, 0

    def stop(self) -> None:
        self.clock = None

    def measuring(self, rows: Tensor, send: list[int] | None, group: dist.ProcessGroup) -> AbstractContextManager[None]:
        """Around one exchange of `rows`, split as `send` says (None: equally)."""
        return IDLE if self.clock is None else self._measured(self.clock, rows, send, group)

    @contextmanager
    def _measured(
        self, clock: Callable[[], float], rows: Tensor, send: list[int] | None, group: dist.ProcessGroup
    ) -> Iterator[None]:
        staying = len(rows) // dist.get_world_size(group) if send is None else send[dist.get_rank(group)]
        self.sent_bytes += (len(rows) - staying) * math.prod(rows.shape[1:]) * rows.element_size()
        began = clock()
        yield
        self.seconds += clock() - began
