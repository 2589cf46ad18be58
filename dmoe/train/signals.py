"""SIGTERM and SIGINT ask for an orderly end, SIGUSR1 for a checkpoint: all ranks agree on a step first, and then act."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from dmoe.train.reduction import Requests

ECHO = 0.3
"""Seconds within which a second signal is the first one once more: Slurm and the launcher can both pass on the same SIGTERM."""


class Signals:
    """Remembers what this process was told; a second request to end is obeyed at once.

    A signal can reach one rank and not the others, and at any line of a step. So it only sets a flag here; the flag travels in the
    step's control reduction, and all ranks act on the sum, after the same step.
    """

    def __init__(self) -> None:
        self.number = 0
        """The signal that asked for the end, 0 for none."""
        self._save, self._when = False, 0.0

    @property
    def stop(self) -> bool:
        return self.number != 0

    def listen(self) -> None:
        """Main thread only, as Python demands of signal handlers."""
        signal.signal(signal.SIGTERM, self._remember)
        signal.signal(signal.SIGINT, self._remember)
        signal.signal(signal.SIGUSR1, self._remember_save)

    def requests(self, failed: bool) -> Requests:
        """What to tell the other ranks in this step; a request to save is told once."""
        save, self._save = self._save, False
        return Requests(self.stop, save, failed)

    def saved(self) -> None:
        """The state is on its way to the disk. A launcher that passes SIGUSR1 on reaches the ranks one after another: who hears of it
        only now, before the next step changes anything, has what it asks for, and must not have it saved again."""
        self._save = False

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.stop and now - self._when < ECHO:
            return
        self._when = now
        if self.stop:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.number = number

    def _remember_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True
