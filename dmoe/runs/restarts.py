"""What the attempts of one job came to, in `attempts.json`: when the launcher should not have started this one at all.

torchrun restarts a job after any failure, `--max-restarts` times. Two kinds of failure come back the same way each time: a fault at
one step before the next checkpoint, and an error that no restart can cure (NaN in the data). The first is noticed by counting the
starts from one step. For the second the verdict is written down, and the restarts that follow end at once with the same words.

Rank 0 asks for the verdict first, then records its attempt, which wipes an older verdict. A file that is torn, odd or of another job
counts as none: the worst it can cost is one attempt more.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dmoe.config.errors import NoProgressError

NAME = "attempts.json"


@dataclass(frozen=True)
class FatalError:
    code: int
    text: str


@dataclass(frozen=True)
class RestartRecord:
    """`count` starts in a row, up to and with number `restart`, went on from `resumed_step`."""

    job: str | None
    restart: int
    resumed_step: int
    count: int
    fatal_error: FatalError | None = None


def record_attempt(
    run: Path, job: str | None, restart: int, resumed_step: int, last_step: int, limit: int
) -> None:
    """Count this start, and refuse it if `limit` earlier ones in a row went on from the same step.

    Args:
        restart: how many times the launcher has restarted the job; 0 is a person's own start, and counts afresh.
        resumed_step: the step this start goes on from; 0 at the beginning.
        last_step: the last step that was logged (`last_logged_step`), for the message.

    Raises:
        NoProgressError: the limit is passed.
    """
    assert limit >= 1, "a job has one attempt at least"
    before = _read(run)
    count = 1
    if (
        before is not None
        and _goes_on(before, job, restart)
        and resumed_step == before.resumed_step
    ):
        count = before.count + 1
    _write(run, RestartRecord(job, restart, resumed_step, count))
    if count > limit:
        reached = (
            f"the last one reached step {last_step}"
            if last_step > resumed_step
            else "the last one logged no step"
        )
        many = f"{limit} attempts in a row" if limit > 1 else "an attempt"
        raise NoProgressError(
            f"{many} ended without a checkpoint after step {resumed_step} ({reached}): the same fault seems to come back at the same "
            "place, not starting again; look at what the ranks said, or save more often (checkpoint.every)"
        )


def record_fatal_error(run: Path, job: str | None, code: int, text: str) -> None:
    """Note that the job ended for a reason that a restart cannot cure, with this exit code and message."""
    before = _read(run)
    if before is None or before.job != job:
        before = RestartRecord(job, restart=0, resumed_step=0, count=1)
    _write(run, replace(before, fatal_error=FatalError(code, text)))


def earlier_fatal_error(run: Path, job: str | None, restart: int) -> tuple[int, str] | None:
    """Exit code and message of an earlier attempt of this same job that said so; never at a person's own start (restart 0)."""
    before = _read(run)
    if before is None or before.fatal_error is None or not _goes_on(before, job, restart):
        return None
    return before.fatal_error.code, before.fatal_error.text


def _goes_on(before: RestartRecord, job: str | None, restart: int) -> bool:
    """Whether `restart` is a later attempt of the job that wrote `before`."""
    return restart > 0 and before.job == job


def _read(run: Path) -> RestartRecord | None:
    try:
        found = json.loads((run / NAME).read_bytes())
        fatal = found.pop("fatal_error")
        attempts = RestartRecord(
            **found, fatal_error=FatalError(**fatal) if fatal is not None else None
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    numbers = [attempts.restart, attempts.resumed_step, attempts.count]
    texts = [] if attempts.job is None else [attempts.job]
    if attempts.fatal_error is not None:
        numbers.append(attempts.fatal_error.code)
        texts.append(attempts.fatal_error.text)
    sound = all(type(number) is int for number in numbers) and all(
        isinstance(text, str) for text in texts
    )
    return attempts if sound else None


def _write(run: Path, attempts: RestartRecord) -> None:
    """All of it or nothing: a rename over the old file, both on the disk before this returns."""
    fresh = run / f".{NAME}.new"
    with fresh.open("w", encoding="utf-8") as file:
        json.dump(asdict(attempts), file)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(run / NAME)
    folder = os.open(run, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
