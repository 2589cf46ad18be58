"""Detect unreachable ranks after a failed collective, so that the error names them.

gloo reports "timed out" or "connection closed" and at best the neighbour in its ring. Here every
surviving rank appends its number to a list in the store that started the group (`ALIVE_KEY`), and
reads the list until all ranks are on it or a grace period ends. A rank that is not on it is dead,
frozen (a stopped process, a hung driver) or cut off.

Survivors do not fail at the same moment: each waits for its own time-out, one may still compute,
and in a ring only the dead rank's neighbours notice at once. So each rank runs a
`LivenessResponder`, a thread that looks for a probe (`PROBE_KEY`) four times a second and answers
while the main thread is busy. A frozen process stops its threads too and does not answer. Without
responders, ranks that fail after the grace period would be named as well.

The store itself may be lost: it is in the launcher or in rank 0. Rank 0 waits a little longer than
the others, so that they do not find the store gone. A call to a frozen store cannot be cancelled
(its time-out is the group's, minutes), so the probe runs in a daemon thread, left behind if stuck.

Cost: a responder reads one key four times a second. A probe: about 20 small messages per rank in
0.7 s.
"""

from __future__ import annotations

import os
import re
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from dmoe.config.errors import LostRankError

ALIVE_KEY = "rank-failure/alive"
"""Store key of the ranks that answered, as "3 0 2 "; a rank may be in it twice."""

PROBE_KEY = "rank-failure/probe"
"""Store key that exists once a rank has asked for answers."""

CALLBACK_PREFIX = r"^(?:Got the following error when running the callback: RuntimeError: )?"
PROBE_INTERVAL, READ_INTERVAL = 0.25, 0.05  # seconds
# Seconds. Both below 1: the time that a failure may take beyond the collective's time-out.
GRACE, STORE_OWNER_GRACE = 0.7, 0.9


def is_collective_failure(error: BaseException) -> bool:
    """Return True if a collective failed because of a peer.

    gloo raises a plain RuntimeError that starts with the place in its source. An error in DDP's
    all-reduce arrives through a future's callback, which puts a sentence of torch's before it.
    """
    if isinstance(error, dist.DistError):
        return True
    pattern = CALLBACK_PREFIX + r"\[\S*\bgloo/\S+:\d+\] "
    return isinstance(error, RuntimeError) and re.match(pattern, str(error)) is not None


def lost_rank_error(error: BaseException, step: int, waited: float) -> LostRankError:
    """Probe the ranks (less than 1 s) and return an error that names the unreachable ones.

    Args:
        error: the error of the failed collective.
        step: the step that failed, counted from 1.
        waited: seconds since the step or the collective began.
    """
    rank = dist.get_rank()
    owns_store = rank == 0 and not _launcher_owns_store()
    probe = _probe_ranks(STORE_OWNER_GRACE if owns_store else GRACE)
    when = f"in step {step} after {waited:.0f} s"
    if probe.unreachable_store:
        text = (
            f"rank {rank} lost {probe.unreachable_store}, {when}, so the other missing ranks are"
            " unknown"
        )
    elif not probe.missing:
        text = (
            f"rank {rank} lost its connection to a rank {when}, and all ranks answer: one was late"
            " or is at another collective (debug.collectives=true names it)"
        )
    else:
        one = len(probe.missing) == 1
        lost = f"rank{'' if one else 's'} {', '.join(map(str, probe.missing))}"
        state = f"{'the rank is' if one else 'they are'} dead, frozen or cut off"
        text = f"rank {rank} lost {lost} {when} ({state})"
    return LostRankError(f"{text}: {_summary(error)}")


def missing_ranks(seconds: float = GRACE) -> list[int]:
    """List the ranks that did not answer within `seconds`. Never raises.

    Rank 0 is listed if it holds the store and the store does not answer.
    """
    return _probe_ranks(seconds).missing


class LivenessResponder:
    """Thread that answers the probes of other ranks while this rank is busy.

    One for the life of the process group; close it before the group is destroyed.
    """

    def __init__(self) -> None:
        self._stop = threading.Event()
        store: Any = _get_default_store()
        # Its own connection, since calls on one store wait for each other. torch's stubs lack it.
        store = store.clone()
        self._thread = threading.Thread(
            target=_answer_probes,
            args=(store, dist.get_rank(), self._stop),
            name="liveness-responder",
            daemon=True,
        )
        self._thread.start()

    def close(self) -> None:
        """Stop answering. Waits at most half a second for a store call in progress."""
        self._stop.set()
        self._thread.join(2 * PROBE_INTERVAL)

    def __enter__(self) -> LivenessResponder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _answer_probes(store: Any, rank: int, stop: threading.Event) -> None:
    # A RuntimeError means that the store is gone, and with it every way to probe.
    with suppress(RuntimeError):
        while not stop.wait(PROBE_INTERVAL):
            if store.check([PROBE_KEY]):
                store.append(ALIVE_KEY, f"{rank} ")
                return


@dataclass(frozen=True)
class _LivenessProbe:
    missing: list[int]
    unreachable_store: str = ""
    """The owner of the store, if the store did not answer."""


def _probe_ranks(seconds: float) -> _LivenessProbe:
    readings: list[set[int]] = []
    all_ranks = set(range(dist.get_world_size()))
    deadline = time.monotonic() + seconds
    arguments = (_get_default_store(), dist.get_rank(), all_ranks, deadline, readings)
    reader = threading.Thread(target=_read_answers, args=arguments, name="rank-probe", daemon=True)
    reader.start()
    reader.join(seconds + 0.1)
    if readings:
        return _LivenessProbe(sorted(all_ranks - readings[-1]))
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if _launcher_owns_store():
        return _LivenessProbe([], f"the launcher's store at {address}")
    return _LivenessProbe([0], f"rank 0, which keeps the store at {address}")


def _read_answers(
    store: Any, rank: int, all_ranks: set[int], deadline: float, readings: list[set[int]]
) -> None:
    """Answer, set the probe, and append each reading, until all ranks answered or the deadline."""
    with suppress(RuntimeError):  # the store is gone
        store.append(ALIVE_KEY, f"{rank} ")
        store.set(PROBE_KEY, "")
        while True:
            readings.append({int(number) for number in store.get(ALIVE_KEY).split()})
            if readings[-1] == all_ranks or time.monotonic() > deadline:
                return
            time.sleep(READ_INTERVAL)


def _launcher_owns_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _summary(error: BaseException) -> str:
    """First sentence of the library's message, without the place in its source."""
    lines = str(error).splitlines() or [type(error).__name__]
    return re.sub(CALLBACK_PREFIX + r"\[\S+:\d+\] ", "", lines[0], count=1).split(". ")[0]
