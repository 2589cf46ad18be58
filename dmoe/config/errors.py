"""The errors a user can cause, and the exit code each ends with."""

from __future__ import annotations


class DmoeError(Exception):
    """An error with a message meant for the user: printed as one line, never as a traceback."""

    exit_code = 1
    every_rank = False
    """Whether each rank has something of its own to say; else all ranks find the same mistake, and one of them says it."""


class ConfigError(DmoeError, ValueError):
    """A value that cannot work. The message names the field, its value, what is allowed and the fix."""

    exit_code = 2

    def __init__(self, field: str, value: object, allowed: str, fix: str) -> None:
        self.field = field
        super().__init__(f"{field}={value}: {allowed}; {fix}")


class CheckpointError(DmoeError):
    """A checkpoint that is missing, damaged or does not belong to this run."""

    exit_code = 3


class NumbersError(DmoeError):
    """Training produced numbers that cannot be trained on (NaN, Inf, a router that learns nothing)."""

    exit_code = 4


class NoProgressError(DmoeError):
    """The launcher starts the job again and again from one step, and it never gets to the next checkpoint."""

    exit_code = 5


class LostRankError(DmoeError):
    """A collective failed because a rank is gone; the message names the rank, as this one sees it."""

    exit_code = 1
    every_rank = True
