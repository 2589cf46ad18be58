"""SIGTERM and SIGINT ask for an orderly end: all ranks agree on a step, save it, and leave."""

from __future__ import annotations

import os
import signal
from types import FrameType

__all__ = ["StopRequest"]


class StopRequest:
    """Remembers that this process was told to stop; a second signal ends it at once.

    A signal can reach one rank and not the others, and at any line of a step. So it only sets a flag here; the flag travels in the
    step's control reduction, and all ranks act on the sum, after the same step.
    """

    def __init__(self) -> None:
        self.number = 0

    @property
    def asked(self) -> bool:
        return self.number != 0

    def listen(self) -> None:
        """Main thread only, as Python demands of signal handlers."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.number = number
