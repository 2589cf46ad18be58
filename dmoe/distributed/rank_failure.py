"""Who is missing? After a failed collective the survivors find out, so that the message can name the rank.

gloo says "timed out" or "connection closed" and names at best the neighbour in its ring. Here every survivor adds its number to a
list in the store that started the group, and reads the list until all are on it or its patience is over: who is not on it is dead,
frozen (a stopped process, a hung driver) or cut off.

Survivors do not fail at the same moment. Each waits its own time-out from when it came, one may be computing still, and in a ring
the dead rank's neighbours hear of it at once, the others only when those neighbours leave. So each rank has a `Listener`, a thread
that looks four times a second whether the roll is called, and answers while the main thread is busy or waits; it is stopped with
the process, so a frozen rank does not answer. Without listeners, ranks that fail later than the caller's patience are named as well.

The store may be what is lost: it lives in the launcher, or in rank 0. Rank 0 then waits a little longer than the others, so that
they do not find the store gone. A call to a frozen store cannot be cut short (its time-out is the group's, minutes), so the roll is
called in a thread, which is left behind if it does not come back.

Cost: a listener asks the store for one key, four times a second. A roll call, about 20 small messages a rank in 0.7 s.
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

ALIVE_KEY = "roll-call/present"
"""The ranks that answered, as "3 0 2 "; a rank may be on it twice."""

PROBE_KEY = "roll-call/called"
IN_CALLBACK = r"^(?:Got the following error when running the callback: RuntimeError: )?"
PROBE_INTERVAL, READ_INTERVAL = 0.25, 0.05  # seconds
GRACE, STORE_OWNER_GRACE = (
    0.7,
    0.9,
)  # seconds; both below 1, which is what a failure may take beyond the time-out


def is_collective_failure(error: BaseException) -> bool:
    """Whether a collective failed for want of a peer. gloo raises a plain RuntimeError that starts with the place in its source;
    one that fails in DDP's sums comes through a future's callback, which puts a sentence of torch's before that."""
    if isinstance(error, dist.DistError):
        return True
    return (
        isinstance(error, RuntimeError)
        and re.match(IN_CALLBACK + r"\[\S*\bgloo/\S+:\d+\] ", str(error)) is not None
    )


def lost_rank_error(error: BaseException, step: int, waited: float) -> LostRankError:
    """Call the roll (less than 1 s) and say who is missing: the error to raise in place of `error`.

    Args:
        step: the step that failed, as people count.
        waited: seconds since the step began, or since the collective did.
    """
    rank = dist.get_rank()
    call = _probe_ranks(
        STORE_OWNER_GRACE if rank == 0 and not _launcher_keeps_store() else GRACE
    )
    who = f"rank {rank}"
    when = f"in step {step} after {waited:.0f} s"
    if call.silent_store:
        text = f"{who} lost {call.silent_store}, {when}, so it cannot be known which other ranks are missing"
    elif not call.missing:
        text = f"{who} lost its connection to a rank {when}, and all ranks answer: one was late or is at another collective"
        text += " (debug.collectives=true names it)"
    else:
        one = len(call.missing) == 1
        lost = f"rank{'' if one else 's'} {', '.join(map(str, call.missing))}"
        text = f"{who} lost {lost} {when} ({'the rank is' if one else 'they are'} dead, frozen or cut off)"
    return LostRankError(f"{text}: {_first_line(error)}")


def missing_ranks(seconds: float = GRACE) -> list[int]:
    """The ranks that have not answered within `seconds`; rank 0 if it keeps the store and that does not answer. Never raises."""
    return _probe_ranks(seconds).missing


class LivenessResponder:
    """Answers a roll call while the rank is busy. One for the life of the group; close it before the group is destroyed."""

    def __init__(self) -> None:
        self._over = threading.Event()
        store: Any = _get_default_store()
        store = store.clone()  # a connection of its own, since a store's calls wait for each other; torch's stubs lack it
        self._thread = threading.Thread(
            target=_listen,
            args=(store, dist.get_rank(), self._over),
            name="roll-call-listener",
            daemon=True,
        )
        self._thread.start()

    def close(self) -> None:
        """Stop answering. Waits for a question to the store that is under way, half a second at most."""
        self._over.set()
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


def _listen(store: Any, rank: int, over: threading.Event) -> None:
    with suppress(RuntimeError):  # the store is gone: nobody can call the roll any more
        while not over.wait(PROBE_INTERVAL):
            if store.check([PROBE_KEY]):
                store.append(ALIVE_KEY, f"{rank} ")
                return


@dataclass(frozen=True)
class _LivenessProbe:
    missing: list[int]
    silent_store: str = ""
    """Who keeps the store, if it did not answer."""


def _probe_ranks(seconds: float) -> _LivenessProbe:
    seen: list[set[int]] = []
    everyone = set(range(dist.get_world_size()))
    arguments = (_get_default_store(), dist.get_rank(), everyone, time.monotonic() + seconds, seen)
    caller = threading.Thread(target=_read_answers, args=arguments, name="roll-call", daemon=True)
    caller.start()
    caller.join(seconds + 0.1)
    if seen:
        return _LivenessProbe(sorted(everyone - seen[-1]))
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if _launcher_keeps_store():
        return _LivenessProbe([], f"the launcher's store at {place}")
    return _LivenessProbe([0], f"rank 0, which keeps the store at {place}")


def _read_answers(
    store: Any, rank: int, everyone: set[int], deadline: float, seen: list[set[int]]
) -> None:
    """Answer, call, and put each reading into `seen`, until nobody is missing or the time is over."""
    with suppress(RuntimeError):  # the store is gone
        store.append(ALIVE_KEY, f"{rank} ")
        store.set(PROBE_KEY, "")
        while True:
            seen.append({int(number) for number in store.get(ALIVE_KEY).split()})
            if seen[-1] == everyone or time.monotonic() > deadline:
                return
            time.sleep(READ_INTERVAL)


def _launcher_keeps_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _first_line(error: BaseException) -> str:
    """What the library says, without the place in its source and the advice that follows."""
    lines = str(error).splitlines() or [type(error).__name__]
    return re.sub(IN_CALLBACK + r"\[\S+:\d+\] ", "", lines[0], count=1).split(". ")[0]
