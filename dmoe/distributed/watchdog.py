"""Watchdog of a step: a thread that names the lost rank while the main thread waits for it.

gloo raises an error where a peer is gone or its time-out ends. On NCCL the main thread waits for a
stream, which no error ends: after the time-out torch kills the process, without a word on which
rank is gone, and a checkpoint that is being written is lost. So after `SHARE` of
`parallel.timeout` the watchdog probes the ranks over the store (`rank_failure.py`). If one does not
answer, the watchdog prints the same sentence as on gloo, gives `before_exit` a moment, and ends the
process with the same exit code. It does the same on both back-ends.

A step that is only long ends nothing: all ranks answer, and after as long again they are asked
again. So evaluations can be watched too. Not watched: what comes before `start`, and waits for
checkpoints, where a slow disk is not a fault; both have `parallel.start_timeout`.

Cost: the thread wakes four times a second.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch.distributed as dist

from dmoe.config.errors import LostRankError
from dmoe.distributed.rank_failure import (
    FAILED,
    PROBE_INTERVAL,
    describe_probe,
    owns_store,
    probe_ranks,
)

SHARE = 0.8
"""Part of the time-out after which ranks are probed. The rest is for the probe and the exit."""
GRACE, STORE_OWNER_GRACE = 5.0, 7.0
"""Seconds that ranks have to answer: much, since a process that has no processor for a second is
not dead. So the watchdog is of use on NCCL from a `parallel.timeout` of a minute on, which is half
of the default; gloo's own errors end a run with a shorter one."""


class Watchdog:
    """Probes the ranks where one `watch` lasts too long; does nothing without other ranks."""

    def __init__(self, timeout: float, before_exit: Sequence[Callable[[], None]] = ()) -> None:
        """Watch nothing yet.

        Args:
            timeout: seconds that a collective may wait.
            before_exit: called in the thread before it ends the process.
        """
        self.timeout, self.before_exit = timeout, before_exit
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._watched = ""
        self._began = 0.0
        self._count = self._probes = 0
        """Watched so far, and probes of the current one: equal on all ranks, and so names them."""
        self._noted = False

    def start(self) -> None:
        """Start the thread."""
        if self._thread is None and dist.is_initialized() and dist.get_world_size() > 1:
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()

    @contextmanager
    def watch(self, name: str) -> Iterator[None]:
        """Watch the block, which all ranks run at one time; `name` is what they do."""
        with self._lock:
            self._watched, self._began = name, time.monotonic()
            self._count, self._probes = self._count + 1, 0
        try:
            yield
        finally:
            with self._lock:  # waits for ever if the thread has begun to end the process
                self._watched = ""

    def close(self) -> None:
        """Stop the thread. Waits at most half a second for a store call in progress."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(2 * PROBE_INTERVAL)

    def _run(self) -> None:
        while not self._stop.wait(min(PROBE_INTERVAL, self.timeout / 20)):
            with self._lock:
                waited = time.monotonic() - self._began
                late = self._watched and waited > SHARE * self.timeout * (self._probes + 1)
                current = self._count
                self._probes += bool(late)
            if late:
                self._check(current, f"{current}.{self._probes}")

    def _check(self, current: int, name: str) -> None:
        """Probe the ranks, and end the process if one is missing and the block still runs."""
        probe = probe_ranks(STORE_OWNER_GRACE if owns_store() else GRACE, name, self._stop)
        with self._lock:
            if not self._watched or self._count != current or self._stop.is_set():
                return
            waited = time.monotonic() - self._began
            if probe.missing or probe.unreachable_store:
                self._end(describe_probe(probe, self._watched, waited))
            if dist.get_rank() == 0 and not self._noted:
                self._noted = True
                _print(
                    f"{self._watched} has taken {waited:.0f} s and all ranks answer: it is long, or"
                    " one is at another collective (debug.collectives=true names it); collectives"
                    f" fail after parallel.timeout={self.timeout:g}"
                )

    def _end(self, text: str) -> None:
        _print(f"{text}: no end after {SHARE:g} of parallel.timeout={self.timeout:g} s")
        # Ranks whose collective fails because this one ends must not name it.
        probe_ranks(0.0, FAILED)
        for action in self.before_exit:
            with suppress(Exception):
                action()
        sys.stdout.flush()
        # The main thread cannot be woken, and the exit of torch would wait for its collective.
        os._exit(LostRankError.exit_code)


def _print(text: str) -> None:
    """Print a line on stderr, as the commands print errors."""
    print(f"dmoe: {text}", file=sys.stderr, flush=True)
