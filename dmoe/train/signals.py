"""Signals: SIGTERM, SIGINT, SIGHUP and warnings of a limit request a stop, SIGUSR1 a checkpoint.

All ranks agree on the step first, through the control reduction of the step, and then act.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

from dmoe.distributed.launcher import handled_stop_signals
from dmoe.train.reduction import Requests

WARNINGS = (signal.SIGUSR2, signal.SIGXCPU)
"""Sent before a scheduler's limit, XCPU once a second: never the second request to stop."""
REPEAT_SECONDS = 0.3
"""A second signal within this time is the first one again: Slurm and the launcher can both forward
one SIGTERM."""


class StopRequested(Exception):
    """All ranks have agreed to stop, because a signal has reached at least one of them.

    Raised on all ranks at the same point; the trainer saves the state and raises it again.
    """

    def __init__(self, signal_number: int = signal.SIGTERM) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


class Signals:
    """Records the signals that reach this process; a second request to stop ends it at once.

    A signal can reach one rank and not the others, at any line of a step. So the handlers only set
    a flag; the step's control reduction sums the flags, and all ranks act on the sum after the same
    step.
    """

    def __init__(self) -> None:
        self.stop_signal = 0
        """Number of the signal that requested the stop, 0 for none."""
        self._save_requested = False
        self._stop_time: float | None = None

    def is_stop_requested(self) -> bool:
        return self.stop_signal != 0

    def install_handlers(self) -> None:
        """Install the handlers, on the main thread: Python allows it nowhere else."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in handled_stop_signals():
            signal.signal(number, self._on_stop_signal)
        signal.signal(signal.SIGUSR1, self._on_save_signal)

    def take_requests(self, failed: bool) -> Requests:
        """Return this rank's requests for the next control reduction, and clear that to save.

        `failed`: whether a background save has failed on this rank.
        """
        save, self._save_requested = self._save_requested, False
        return Requests(self.is_stop_requested(), save, failed)

    def clear_save_request(self) -> None:
        """Clear the request to save, after a save that another rank has requested.

        A launcher forwards SIGUSR1 to the ranks one after another. A rank that receives it after
        the save, before the next step changes anything, must not have the state saved again.
        """
        self._save_requested = False

    def _on_stop_signal(self, number: int, frame: FrameType | None) -> None:
        now, earlier = time.monotonic(), self._stop_time
        if number not in WARNINGS:
            if earlier is not None and now - earlier < REPEAT_SECONDS:
                return
            if earlier is not None:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._stop_time = now
        self.stop_signal = self.stop_signal or number

    def _on_save_signal(self, number: int, frame: FrameType | None) -> None:
        self._save_requested = True
