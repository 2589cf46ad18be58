"""The run directory of one job: created and locked on rank 0, the outcome broadcast to all ranks.

So a refusal ends all ranks with the same message and exit code.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dmoe.config.errors import ConfigError, DmoeError, NoProgressError
from dmoe.config.plugins import references
from dmoe.config.schema import Config, TrainConfig
from dmoe.distributed.init import ProcessInfo, elastic_run_id, run_on_rank0
from dmoe.runs.directory import RunDir, name_run
from dmoe.runs.lock import RunLock
from dmoe.runs.metrics_log import last_logged_step, read_metrics
from dmoe.runs.restarts import earlier_fatal_error, record_attempt, record_fatal_error


class RunSession:
    """A run directory that this job has locked, until `close`."""

    def __init__(self, directory: RunDir, process: ProcessInfo, lock: RunLock | None) -> None:
        """`lock`: held by rank 0, None on the others."""
        self.directory, self.process, self._lock = directory, process, lock
        # now, since the working directory may be gone at the end of the run
        path, here = directory.path, Path.cwd()
        self._name = str(path.relative_to(here) if path.is_relative_to(here) else path)

    @property
    def lock_warning(self) -> str | None:
        return self._lock.warning if self._lock is not None else None

    def record_attempt(self, resumed_step: int, max_attempts: int) -> None:
        """Record that this attempt of the job starts from `resumed_step`. Collective.

        Raises NoProgressError on all ranks after `max_attempts` starts in a row from one step.
        """

        def record() -> str:
            record_attempt(
                self.directory.path,
                elastic_run_id(),
                self.process.restart_count,
                resumed_step,
                last_logged_step(self.directory.metrics),
                max_attempts,
            )
            return ""

        try:
            _run_on_rank0(self.process, self.directory.path, record)
        except NoProgressError as error:  # recorded: restarts that may follow end at once
            self.record_fatal_error(error)
            raise

    def check_steps_left(self, steps_done: int, config: TrainConfig) -> None:
        """Raise ConfigError if the run has done more steps than `train.steps` asks for."""
        if steps_done > config.steps:
            allowed = f"the run in {self} has done {steps_done} steps already"
            fix = "use more, or another train.run_dir"
            raise ConfigError("train.steps", config.steps, allowed, fix)

    def is_evaluation_missing(self, step: int, config: TrainConfig) -> bool:
        """Return whether the evaluation after `step` is due and not logged. Collective.

        That is so at the start, and where a process ended before the evaluation. At step 0 the log
        is not asked: an earlier process may have had another config, so other weights.
        """

        def answer() -> str:
            if not step:
                return "yes" if config.eval_first else "no"
            due = config.eval_every > 0 and step % config.eval_every == 0 and step < config.steps
            path = self.directory.metrics
            records = read_metrics(path, layers=False) if due and path.exists() else []
            logged = any(line["event"] == "eval" and line["step"] == step for line in records)
            return "yes" if due and not logged else "no"

        return _run_on_rank0(self.process, self.directory.path, answer) == "yes"

    def write_config(self, config: Config, config_text: str) -> None:
        """Write the config to the run directory, once it is known to fit the checkpoints there.

        Collective. Raises ConfigError on all ranks where the directory cannot be written.
        """

        def write() -> str:
            self.directory.write_config(config, config_text)
            # A refusal later would come on rank 0 alone.
            self.directory.metrics.open("a").close()
            return ""

        _run_on_rank0(self.process, self.directory.path, write)

    def __str__(self) -> str:
        """Return the path, relative to the working directory if the run is below it."""
        return self._name

    def resume_command(self, config: Config) -> str:
        """Return the command that goes on with this run, on as many local ranks as now."""
        world = self.process.world_size
        more = f" --ranks {world}" if world > 1 else ""
        more += " --trust-code" if references(config) else ""
        return f"dmoe train --resume {shlex.quote(str(self))}{more}"

    def record_fatal_error(self, error: DmoeError) -> None:
        """Record an error that a restart cannot cure, for the attempts that the launcher starts."""
        if self.process.is_main:
            with suppress(OSError):  # a full disk must not hide why the run ends
                record_fatal_error(
                    self.directory.path, elastic_run_id(), error.exit_code, str(error)
                )

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()


def open_session(config: TrainConfig, process: ProcessInfo) -> RunSession:
    """Create and lock the run directory. Collective.

    Raises on all ranks: ConfigError where it cannot be written or another job uses it; the recorded
    error of an earlier attempt of this job, if a restart cannot cure it.
    """
    locks: list[RunLock] = []

    def create_and_lock() -> str:
        run = RunDir(name_run(config))
        run.create(config.run_dir)
        locks.append(RunLock.acquire(run.path, elastic_run_id()))
        fatal_error = earlier_fatal_error(run.path, elastic_run_id(), process.restart_count)
        if fatal_error is not None:
            raise _repeat_error(*fatal_error)
        return str(Path(os.path.realpath(run.path)))

    path = _run_on_rank0(process, Path(config.run_dir or "runs"), create_and_lock)
    return RunSession(RunDir(Path(path)), process, locks[0] if locks else None)


def _run_on_rank0(process: ProcessInfo, path: Path, action: Callable[[], str]) -> str:
    """Run `action` on rank 0, with its OSError as a ConfigError of `train.run_dir` on all ranks."""

    def run() -> str:
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

    return run_on_rank0(process, run)


def _repeat_error(exit_code: int, text: str) -> DmoeError:
    error = DmoeError(f"not tried again: {text}")
    error.exit_code = exit_code
    return error
