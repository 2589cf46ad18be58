"""Where the time of one step goes, on this rank.

Each `lap` books the time since the last one under a name, less what the exchanges took in between, which has a name of its own. On
CUDA every lap and both ends of every exchange wait for the device, so only steps that are logged carry a stopwatch; what the device
still had to do of the step before falls to the first part, the data.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from dmoe.distributed.meter import CommTimer

__all__ = ["PARTS", "Stopwatch"]

PARTS = ("data", "forward", "backward", "exchange", "optimizer", "other")


class Stopwatch:
    def __init__(self, device: torch.device, meters: Sequence[CommTimer], began: float) -> None:
        """`began`: when the step began, by `time.monotonic`. The meters run until `stop_meters`."""
        self.device, self.meters = device, meters
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.last, self.exchanged = began, 0.0
        for meter in meters:
            meter.start(self.now)

    def now(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()

    def mark(self, part: str) -> None:
        now, exchanged = self.now(), sum(meter.seconds for meter in self.meters)
        self.seconds["exchange"] += exchanged - self.exchanged
        self.seconds[part] += now - self.last - (exchanged - self.exchanged)
        self.last, self.exchanged = now, exchanged

    def stop_meters(self) -> int:
        """What comes now is no exchange of this step; the bytes that this rank has sent to others in it."""
        for meter in self.meters:
            meter.stop()
        return sum(meter.sent_bytes for meter in self.meters)
