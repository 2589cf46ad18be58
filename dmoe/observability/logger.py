"""Logger of a run: terminal, `metrics.jsonl` and trackers. No output except on the main process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dmoe.config.schema import Config
from dmoe.config.secrets import redact
from dmoe.observability import escape_controls, run_with_timeout
from dmoe.observability.display import Display, open_display
from dmoe.observability.trackers import Trackers
from dmoe.runs.directory import RunDir
from dmoe.runs.metrics_log import MetricsFile

REPORT_SECONDS = 10.0
"""Time limit of the report. A launcher kills 30 s after SIGTERM; the last save was before."""


class RunLogger:
    """Logs metrics and events of a run.

    Text is redacted. A full disk or a failing tracker costs lines, never the run.
    """

    listener: Callable[[str, int, dict[str, Any]], None] | None = None
    """Called with each event, its step and its values, on every rank."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        run: RunDir,
        *,
        start_step: int,
        is_main: bool,
        quiet: bool = False,
    ) -> None:
        """Open the terminal display, `metrics.jsonl` and the trackers.

        Args:
            config: the whole config, which the trackers record.
            accelerator: opens the trackers.
            run: the run directory.
            start_step: steps done when this process began, 0 for a new run.
            is_main: whether this is the process that writes.
            quiet: print notes, alerts and the run directory only.
        """
        self.display: Display = open_display(config.train.steps, start_step, is_main, quiet)
        self.metrics = MetricsFile(run.metrics) if is_main else None
        self.run, self.lines_lost = run, 0
        self.trackers = Trackers(
            accelerator,
            config,
            run,
            first_step=start_step,
            notify=lambda text: self.note(start_step, text),
        )

    def print(self, line: str) -> None:
        """Print a line; on a terminal without control characters."""
        text = redact(line)
        self.display.print(escape_controls(text) if sys.stdout.isatty() else text)

    def log_event(self, event: str, step: int, values: dict[str, Any], line: str = "") -> None:
        """Write one line of `metrics.jsonl`.

        Args:
            event: kind of the line.
            step: its step.
            values: its other values.
            line: text for the terminal; empty for none.
        """
        self._write_line(event, step, values)
        self.display.log_event(event, step, values, redact(line))
        if self.listener is not None:
            self.listener(event, step, values)

    def note(self, step: int, text: str) -> None:
        """Log information for the user that needs no action, to the terminal and metrics.jsonl."""
        self.log_event("alert", step, {"text": redact(text)}, f"note: {text}")

    def alert(self, step: int, title: str, text: str) -> None:
        """Log a problem that needs action; also sent to the trackers, which may forward it."""
        self.log_event("alert", step, {"title": title, "text": redact(text)}, f"alert: {text}")
        self.trackers.alert(title, text)

    def log_rollback(self, step: int) -> None:
        """Log that the run continues after `step` steps: what was logged beyond is void."""
        self.log_event("rollback", step, {"resumed_from": step}, f"rolled back to step {step}")
        self.trackers.rollback(step)

    def log_metrics(self, event: str, step: int, values: dict[str, Any], line: str = "") -> None:
        """Log the metrics of a `train` or `eval` line, also to the trackers.

        Args:
            event: `train` or `eval`.
            step: its step.
            values: the metrics.
            line: text for the terminal; empty for none.
        """
        self.log_event(event, step, values, line)
        self.trackers.log(values, step, event)

    def write_report(self, step: int) -> None:
        """Write the report of the finished run and the last figures of the trackers.

        A failure is a note, because the run is trained and saved.
        """
        if self.metrics is None:
            return
        report = self.run.path / "report.html"
        problem = run_with_timeout(lambda: _build_report(self.run.path, report), REPORT_SECONDS)
        if problem:
            retry = f"try dmoe report {self.run.path}"
            text = f"there is no report at the end of this run: {problem}; {retry}"
            self.print(f"note: {text}")
            self.log_event("alert", step, {"text": text})
        self.trackers.finish(None if problem else report)

    def close(self) -> None:
        """Close display, trackers and metrics file."""
        self.display.close()
        self.trackers.close()
        if self.metrics is not None:
            # Closing flushes what a full disk did not take.
            with suppress(OSError):
                self.metrics.close()

    def _write_line(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Write to metrics.jsonl. A full disk does not end the run: that is up to checkpoints."""
        if self.metrics is None:
            return
        try:
            self.metrics.write(event, step, values)
        except OSError as error:
            if not self.lines_lost:
                self.print(
                    f"note: {self.run.metrics} cannot be written ({error.strerror}): "
                    "lines are lost until it can"
                )
            self.lines_lost += 1


def _build_report(run: Path, report: Path) -> None:
    # Imported only at the end of a run.
    from dmoe.report import write_report

    write_report([run], report)
