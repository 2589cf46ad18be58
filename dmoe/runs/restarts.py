"""Restarts of one job, recorded in `attempts.json`: when the launcher should not have restarted it.

torchrun restarts a job after any failure, `--max-restarts` times. Two kinds of failure come back
each time: a fault between one step and the next checkpoint, and an error that no restart cures (NaN
in the data). The first is noticed by counting the starts from one step. The second is recorded, and
the following restarts end at once with the same message.

Rank 0 reads the recorded error first and then records its attempt, which deletes an older one. A
file that is torn, invalid or of another job counts as none; that costs one attempt at most.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeGuard

from dmoe.config.errors import NoProgressError

NAME = "attempts.json"


@dataclass(frozen=True)
class FatalError:
    """Exit code and message of an error that a restart cannot cure."""

    code: int
    text: str


@dataclass(frozen=True)
class RestartRecord:
    """The number of starts in a row from one step. Its field names are the keys of the file."""

    job: str | None
    """Elastic launcher's name of the job."""
    restart: int
    """Number of the last restart; 0 for a manual start."""
    resumed_step: int
    count: int
    """Starts in a row from `resumed_step`."""
    fatal_error: FatalError | None = None


def record_attempt(
    run: Path, job: str | None, restart: int, resumed_step: int, last_step: int, limit: int
) -> None:
    """Count this start; refuse it if `limit` earlier ones in a row began from the same step.

    Args:
        run: the run directory.
        job: the launcher's name of the job, None without a launcher.
        restart: how often the launcher has restarted the job; 0 for a manual start, which resets
            the count.
        resumed_step: the step from which this start continues; 0 at the beginning.
        last_step: the last logged step, for the message.
        limit: allowed starts in a row from one step.

    Raises:
        NoProgressError: the limit is exceeded.
    """
    assert limit >= 1, "a job has one attempt at least"
    before = _read(run)
    count = 1
    if _is_restart_of(before, job, restart) and resumed_step == before.resumed_step:
        count = before.count + 1
    _write(run, RestartRecord(job, restart, resumed_step, count))
    if count > limit:
        reached = "logged no step"
        if last_step > resumed_step:
            reached = f"reached step {last_step}"
        attempts = f"{limit} attempts in a row" if limit > 1 else "an attempt"
        raise NoProgressError(
            f"{attempts} ended without a checkpoint after step {resumed_step} (the last one "
            f"{reached}): the same fault seems to come back at the same place, not starting again; "
            "look at the messages of the ranks, or save more often (checkpoint.every)"
        )


def record_fatal_error(run: Path, job: str | None, code: int, text: str) -> None:
    """Record that the job ended with an error that a restart cannot cure.

    Args:
        run: the run directory.
        job: the launcher's name of the job, None without a launcher.
        code: exit code.
        text: message.
    """
    before = _read(run)
    if before is None or before.job != job:
        before = RestartRecord(job, restart=0, resumed_step=0, count=1)
    _write(run, replace(before, fatal_error=FatalError(code, text)))


def earlier_fatal_error(run: Path, job: str | None, restart: int) -> tuple[int, str] | None:
    """Return exit code and message that an earlier attempt of this job has recorded, or None.

    Always None at a manual start (restart 0).
    """
    before = _read(run)
    if not _is_restart_of(before, job, restart) or before.fatal_error is None:
        return None
    return before.fatal_error.code, before.fatal_error.text


def _is_restart_of(
    before: RestartRecord | None, job: str | None, restart: int
) -> TypeGuard[RestartRecord]:
    """Return whether this start, number `restart`, is a later attempt of the recorded job."""
    return before is not None and restart > 0 and before.job == job


def _read(run: Path) -> RestartRecord | None:
    """Read the record; None if there is none, or it is invalid."""
    try:
        values = json.loads((run / NAME).read_bytes())
        fatal = values.pop("fatal_error")
        error = FatalError(**fatal) if fatal is not None else None
        record = RestartRecord(**values, fatal_error=error)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    numbers = [record.restart, record.resumed_step, record.count]
    texts = [] if record.job is None else [record.job]
    if record.fatal_error is not None:
        numbers.append(record.fatal_error.code)
        texts.append(record.fatal_error.text)
    valid = all(type(number) is int for number in numbers)
    return record if valid and all(isinstance(text, str) for text in texts) else None


def _write(run: Path, record: RestartRecord) -> None:
    """Write the record atomically: a rename over the old file; both are on disk at the return."""
    new_file = run / f".{NAME}.new"
    with new_file.open("w", encoding="utf-8") as file:
        json.dump(asdict(record), file)
        file.flush()
        os.fsync(file.fileno())
    new_file.replace(run / NAME)
    folder = os.open(run, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
