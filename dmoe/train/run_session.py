"""Taking hold of a run directory, before anything is read from it or written to it.

Rank 0 does it and all ranks hear how it went, so that a refusal ends all of them alike, with the same exit code.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dmoe.config.errors import ConfigError, DmoeError, NoProgressError
from dmoe.config.schema import Config, TrainConfig
from dmoe.distributed import init as worlds
from dmoe.distributed.init import ProcessInfo
from dmoe.runs.directory import RunDir, name_run
from dmoe.runs.lock import RunLock
from dmoe.runs.metrics_log import last_logged_step, read_metrics
from dmoe.runs.restarts import (
    earlier_fatal_error,
    record_attempt,
    record_fatal_error,
)


class RunSession:
    """A run directory that is ours until `close`."""

    def __init__(self, directory: RunDir, process: ProcessInfo, lock: RunLock | None) -> None:
        self.directory, self.process, self._lock = directory, process, lock

    @property
    def remark(self) -> str | None:
        return self._lock.remark if self._lock is not None else None

    def begin(self, resumed_step: int, attempts: int) -> None:
        """Note where this attempt starts. Raises NoProgressError on all ranks after `attempts` starts of this job from one step."""

        def note() -> str:
            last = last_logged_step(self.directory.metrics)
            record_attempt(
                self.directory.path,
                worlds.elastic_run_id(),
                self.process.restart_count,
                resumed_step,
                last,
                attempts,
            )
            return ""

        try:
            _in_directory(self.process, self.directory.path, note)
        except NoProgressError as error:  # on rank 0; the attempts that may follow end at once
            self.record_fatal_error(error)
            raise

    def misses_evaluation(self, step: int, config: TrainConfig) -> bool:
        """Whether the evaluation after `step` is due and not told: at the start, or where a process ended before it. Collective.

        A process that starts from nothing tells it in any case: an earlier one may have had another config, so other weights.
        """

        def look() -> str:
            if not step:
                return "yes" if config.eval_first else "no"
            due = config.eval_every > 0 and step % config.eval_every == 0 and step < config.steps
            written = (
                read_metrics(self.directory.metrics)
                if due and self.directory.metrics.exists()
                else []
            )
            told = any(line["event"] == "eval" and line["step"] == step for line in written)
            return "yes" if due and not told else "no"

        return _in_directory(self.process, self.directory.path, look) == "yes"

    def record(self, config: Config, given: str) -> None:
        """Write down what is run: once it is known to fit what the directory holds. Collective; raises ConfigError on all ranks."""

        def write() -> str:
            self.directory.record(config, given)
            self.directory.metrics.open(
                "a"
            ).close()  # or it would be refused on rank 0 alone, later
            return ""

        _in_directory(self.process, self.directory.path, write)

    def __str__(self) -> str:
        """The path as a person in this directory would type it."""
        path, here = self.directory.path, Path.cwd()
        return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)

    def record_fatal_error(self, error: DmoeError) -> None:
        """Trying again would end the same way: what a launcher that restarts us is to be told."""
        if self.process.is_main:
            with suppress(OSError):  # a full disk must not hide why the run ends
                record_fatal_error(
                    self.directory.path, worlds.elastic_run_id(), error.exit_code, str(error)
                )

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()


def open_session(config: Config, process: ProcessInfo) -> RunSession:
    """Make the run directory and lock it. Collective.

    Raises, on all ranks: ConfigError where it cannot be written or another job has it; what an earlier attempt of this job said,
    if it said that trying again would not help.
    """
    held: list[RunLock] = []

    def take() -> str:
        run = RunDir(name_run(config))
        run.create(config.train.run_dir)
        held.append(RunLock.take(run.path, worlds.elastic_run_id()))
        verdict = earlier_fatal_error(run.path, worlds.elastic_run_id(), process.restart_count)
        if verdict is not None:
            raise _repeated(*verdict)
        return str(Path(os.path.realpath(run.path)))

    path = _in_directory(process, Path(config.train.run_dir or "runs"), take)
    return RunSession(RunDir(Path(path)), process, held[0] if held else None)


def _in_directory(process: ProcessInfo, path: Path, action: Callable[[], str]) -> str:
    """`worlds.on_first`, where what the system refuses is the user's to mend: one sentence on all ranks."""

    def careful() -> str:
        try:
            return action()
        except OSError as error:
            where, reason = error.filename or path, error.strerror or type(error).__name__
            raise ConfigError(
                "train.run_dir",
                path,
                f"{where} cannot be used ({reason})",
                "look at it, or name another",
            ) from None

    return worlds.run_on_rank0(process, careful)


def _repeated(code: int, text: str) -> DmoeError:
    error = DmoeError(f"not tried again: {text}")
    error.exit_code = code
    return error
