"""Two CUDA streams that copy between host and device beside the computation; none on a CPU.

    with copies.on(allocate) as moved:
        with moved(host) as device:  # for each bucket
            compute on `device`

Order that the events keep, for the bucket n in slot n mod S:

    copy to the device n   after what was computed and copied to the host before `on`, and
                           after the copy to the host n - S, which reads the same slot
    computation n          after the copy to the device n
    copy to the host n     after the computation n

Cost: three events per bucket, no host read. The memory of the slots is given back at the end;
torch's allocator keeps it until the streams are done with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

Moved = Callable[[list[Tensor]], AbstractContextManager[list[Tensor]]]


class CopyStreams:
    """Copies buckets of numbers in turn to the slots of the device and back.

    Args:
        cuda: False where host and device are the same: the copies run in the order of the calls.
    """

    def __init__(self, cuda: bool) -> None:
        self.up, self.down = (torch.cuda.Stream() if cuda else None for _ in range(2))
        self.slots = list[list[Tensor]]()
        self.freed = list[Any]()
        """Event of the copy to the host out of each slot."""
        self.done: Any = None
        """Event of the last copy to the host, until the host has waited for it."""
        self.count = 0

    @contextmanager
    def on(self, allocate: Callable[[], list[list[Tensor]]]) -> Iterator[Moved]:
        """Have slots of the device inside, as `allocate` makes them; yield `moved`."""
        slots = allocate()
        self.slots, self.freed, self.count = slots, [None] * len(slots), 0
        if self.up is not None and self.down is not None:
            self.up.wait_stream(torch.cuda.current_stream())
            self.up.wait_stream(self.down)
            for tensor in (tensor for slot in slots for tensor in slot):
                tensor.record_stream(self.up)
                tensor.record_stream(self.down)
        try:
            yield self.moved
        finally:
            self.slots = []

    @contextmanager
    def moved(self, host: list[Tensor]) -> Iterator[list[Tensor]]:
        """Copy a bucket to the device, and back to the host after the computation inside."""
        place, self.count = self.count % len(self.slots), self.count + 1
        device = [slot[: len(part)] for slot, part in zip(self.slots[place], host, strict=True)]
        if self.up is None or self.down is None:
            _copy(device, host)
            yield device
            _copy(host, device)
            return
        main = torch.cuda.current_stream()
        with torch.cuda.stream(self.up):
            if self.freed[place] is not None:
                self.up.wait_event(self.freed[place])
            _copy(device, host)
            main.wait_event(self.up.record_event())
        yield device
        self.down.wait_event(main.record_event())
        with torch.cuda.stream(self.down):
            _copy(host, device)
            self.freed[place] = self.done = self.down.record_event()

    def wait(self) -> None:
        """Wait on the host until all copies to it are complete."""
        if self.done is not None:
            self.done.synchronize()
            self.done = None


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)
