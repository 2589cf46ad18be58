"""Detect unreachable ranks after a failed collective, so that the error names them.

gloo reports "timed out" or "connection closed" and at best the neighbour in its ring; NCCL reports
nothing before it kills the process (`watchdog.py`). Here every surviving rank appends its number to
a list in the store that started the group (`ALIVE_KEY`), and reads the list until all ranks are on
it or a grace period ends. A rank that is not on it is dead, frozen (a stopped process, a hung
driver) or cut off.

Survivors do not fail at the same moment: each waits for its own time-out, one may still compute,
and in a ring only the dead rank's neighbours notice at once. So each rank runs a
`LivenessResponder`, a thread that looks for a probe (`PROBE_KEY`) four times a second and answers
while the main thread is busy. A frozen process stops its threads too and does not answer. Without
responders, ranks that fail after the grace period would be named as well. Each probe has a name
and, with it, a list of its own: a rank may have died since it answered an earlier one.

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

ALIVE_KEY = "rank-failure/alive/"
"""Store key, with a probe's name behind it, of the ranks that answered: "3 0 2 ", or "3 0 3 "."""

PROBE_KEY = "rank-failure/probe"
"""Store key of the names of the probes; it exists once a rank has asked for answers."""

FAILED = "failed"
"""Name of the last probe of a process."""

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
    probe = probe_ranks(STORE_OWNER_GRACE if owns_store() else GRACE)
    return LostRankError(f"{describe_probe(probe, f'step {step}', waited)}: {_summary(error)}")


def describe_probe(probe: LivenessProbe, during: str, waited: float) -> str:
    """Return what a probe has found, as a clause: which ranks this one lost, when.

    `during`: what the ranks did. `waited`: seconds since it began.
    """
    rank, when = dist.get_rank(), f"in {during} after {waited:.0f} s"
    if probe.unreachable_store:
        return (
            f"rank {rank} lost {probe.unreachable_store}, {when}, so the other missing ranks are"
            " unknown"
        )
    if not probe.missing:
        return (
            f"rank {rank} lost its connection to a rank {when}, and all ranks answer: one was late"
            " or is at another collective (debug.collectives=true names it)"
        )
    one = len(probe.missing) == 1
    lost = f"rank{'' if one else 's'} {', '.join(map(str, probe.missing))}"
    state = f"{'the rank is' if one else 'they are'} dead, frozen or cut off"
    return f"rank {rank} lost {lost} {when} ({state})"


def owns_store() -> bool:
    """Return True if the store ends with this process; others may still need it then."""
    return dist.get_rank() == 0 and not _launcher_owns_store()


def missing_ranks(seconds: float = GRACE) -> list[int]:
    """List the ranks that did not answer within `seconds`. Never raises.

    Rank 0 is listed if it holds the store and the store does not answer.
    """
    return probe_ranks(seconds).missing


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
    answered = set[str]()
    # A RuntimeError means that the store is gone, and with it every way to probe.
    with suppress(RuntimeError):
        while not stop.wait(PROBE_INTERVAL):
            if store.check([PROBE_KEY]):
                for name in set(store.get(PROBE_KEY).decode().split()) - answered:
                    store.append(f"{ALIVE_KEY}{name}", f"{rank} ")
                    answered.add(name)


@dataclass(frozen=True)
class LivenessProbe:
    """Result of a probe."""

    missing: list[int]
    """The ranks that did not answer."""
    unreachable_store: str = ""
    """The owner of the store, if the store did not answer."""


def probe_ranks(
    seconds: float, name: str = FAILED, cancelled: threading.Event | None = None
) -> LivenessProbe:
    """Ask all ranks to answer within `seconds`. Never raises.

    Args:
        seconds: to wait, unless all have answered before.
        name: equal on ranks that ask at one time; a name that was used before repeats its answers.
        cancelled: ends the wait.
    """
    readings: list[set[int]] = []
    all_ranks = set(range(dist.get_world_size()))
    deadline = time.monotonic() + seconds
    cancelled = cancelled or threading.Event()
    rank = dist.get_rank()
    arguments = (_get_default_store(), rank, name, all_ranks, deadline, readings, cancelled)
    reader = threading.Thread(target=_read_answers, args=arguments, name="rank-probe", daemon=True)
    reader.start()
    reader.join(seconds + 0.1)
    if readings:
        return LivenessProbe(sorted(all_ranks - readings[-1]))
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if _launcher_owns_store():
        return LivenessProbe([], f"the launcher's store at {address}")
    return LivenessProbe([0], f"rank 0, which keeps the store at {address}")


def _read_answers(
    store: Any,
    rank: int,
    name: str,
    all_ranks: set[int],
    deadline: float,
    readings: list[set[int]],
    cancelled: threading.Event,
) -> None:
    """Answer, set the probe, and append each reading, until all ranks answered or the deadline."""
    with suppress(RuntimeError):  # the store is gone
        store.append(f"{ALIVE_KEY}{name}", f"{rank} ")
        store.append(PROBE_KEY, f"{name} ")
        while True:
            readings.append({int(number) for number in store.get(f"{ALIVE_KEY}{name}").split()})
            if readings[-1] == all_ranks or time.monotonic() > deadline:
                return
            if cancelled.wait(READ_INTERVAL):
                return


def _launcher_owns_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _summary(error: BaseException) -> str:
    """First sentence of the library's message, without the place in its source."""
    lines = str(error).splitlines() or [type(error).__name__]
    return re.sub(CALLBACK_PREFIX + r"\[\S+:\d+\] ", "", lines[0], count=1).split(". ")[0]
