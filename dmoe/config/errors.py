"""Errors that a user can cause, and the exit code of each."""

from __future__ import annotations

from collections.abc import Mapping


class DmoeError(Exception):
    """An error whose message is meant for the user: printed as one line, without a traceback."""

    exit_code = 1
    every_rank = False
    """True if each rank prints its own message; False if one rank prints it for all."""


class ConfigError(DmoeError, ValueError):
    """A value that cannot work. The message is `field=value: allowed; fix`."""

    exit_code = 2

    def __init__(self, field: str, value: object, allowed: str, fix: str) -> None:
        """Keep the parts of the message.

        Args:
            field: dotted name of the field, or of the option or environment variable.
            value: its value.
            allowed: what is allowed, or why the value is not.
            fix: what to do.
        """
        self.field, self.value, self.allowed, self.fix = field, value, allowed, fix
        super().__init__(f"{field}={value}: {allowed}; {fix}")

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the error by its four parts: pickle's default is the message alone."""
        return type(self), (self.field, self.value, self.allowed, self.fix)

    def renamed(self, names: Mapping[str, str]) -> ConfigError:
        """Return the same error with other field names: each key replaced by its value, in order.

        For rules that are checked on a section built from another one.
        """
        field, allowed, fix = self.field, self.allowed, self.fix
        for old, new in names.items():
            field, allowed, fix = (text.replace(old, new) for text in (field, allowed, fix))
        return ConfigError(field, self.value, allowed, fix)


class OutOfMemoryError(ConfigError):
    """Memory that ran out; the field is the one to lower. Often on some ranks only."""

    every_rank = True


class CheckpointError(DmoeError):
    """A checkpoint that is missing, damaged or does not belong to this run."""

    exit_code = 3


class NumbersError(DmoeError):
    """Training gave numbers that cannot be used: NaN, Inf, a router without gradient."""

    exit_code = 4


class NoProgressError(DmoeError):
    """The launcher restarts the job from the same step again and again without a new checkpoint."""

    exit_code = 5


class LostRankError(DmoeError):
    """A collective failed because a rank is unreachable, which the message names."""

    exit_code = 1
    every_rank = True
