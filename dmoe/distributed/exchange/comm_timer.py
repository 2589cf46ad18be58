"""Time and bytes of a layer's all-to-alls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor, nn

from dmoe.moe.copy_planner import CopyTotals
from dmoe.moe.interfaces import ExpertLayer


@dataclass
class CommTimer:
    """Time and bytes of one layer's all-to-alls, recomputed ones included. Off by default."""

    clock: Callable[[], float] | None = None
    """Returns seconds, after a device synchronisation on a GPU; None while the timer is off."""
    seconds: float = 0.0
    """Includes the time spent waiting for other ranks."""
    sent_bytes: int = 0
    """Sent to other ranks; rows that stay on this rank do not count. Of two levels both steps."""
    copies: CopyTotals = field(default_factory=CopyTotals)

    def start(self, clock: Callable[[], float]) -> None:
        """Reset both sums and start measuring with `clock`."""
        self.clock, self.seconds, self.sent_bytes = clock, 0.0, 0
        self.copies = CopyTotals()

    def stop(self) -> None:
        """Stop measuring and keep the sums."""
        self.clock = None

    @contextmanager
    def measure(
        self, rows: Tensor, send_counts: list[int] | None, group: dist.ProcessGroup
    ) -> Iterator[None]:
        """Measure one all-to-all of `rows`, split by `send_counts` (None: equally)."""
        if self.clock is None:
            yield
            return
        if send_counts is None:
            local_rows = len(rows) // dist.get_world_size(group)
        else:
            local_rows = send_counts[dist.get_rank(group)]
        row_bytes = math.prod(rows.shape[1:]) * rows.element_size()
        self.sent_bytes += (len(rows) - local_rows) * row_bytes
        with self.waiting():
            yield

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the time that a wait for an all-to-all takes."""
        if self.clock is None:
            yield
            return
        start = self.clock()
        yield
        self.seconds += self.clock() - start


def comm_timers(model: nn.Module) -> list[CommTimer]:
    """List the timer of each layer with experts that uses an all-to-all; empty where EP = 1.

    Of banks of modules too (`dmoe.modular`), which send rows as MoE layers do.
    """
    packed = [module.packed for module in model.modules() if isinstance(module, ExpertLayer)]
    groups = [getattr(dispatcher, "expert_group", None) for dispatcher in packed]
    return [group.timer for group in groups if group is not None]
