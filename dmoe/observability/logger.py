"""Where a run is told: the terminal, `metrics.jsonl`, the trackers. Only the main process speaks; on the others all of it is silent."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from dmoe.config.secrets import redact
from dmoe.observability.display import Display, open_display
from dmoe.observability.trackers import Trackers
from dmoe.observability.trackers.time_limit import bounded
from dmoe.runs.directory import RunDir
from dmoe.runs.metrics_log import MetricsFile
from dmoe.train.engine import Engine

REPORT_SECONDS = 10.0
"""Writing the report may take: a launcher that asked for the end kills 30 seconds later, and the last save was before."""


class RunLogger:
    def __init__(self, engine: Engine, run: RunDir, first: int, quiet: bool = False) -> None:
        self.display: Display = open_display(
            engine.config.train.steps, first, engine.process.is_main, quiet
        )
        self.metrics = MetricsFile(run.metrics) if engine.process.is_main else None
        self.run, self.lines_lost = run, 0
        self.trackers = Trackers(
            engine.accelerator,
            engine.config,
            run,
            first_step=first,
            say=lambda text: self.note(first, text),
        )

    def print(self, line: str) -> None:
        """A line on the terminal."""
        self.display.print(redact(line))

    def log_event(self, event: str, step: int, values: dict[str, Any], line: str = "") -> None:
        """One line of `metrics.jsonl`, and `line` on the terminal."""
        self._write_line(event, step, values)
        self.display.log_event(event, step, values, redact(line))

    def note(self, step: int, text: str) -> None:
        """Something a person should know, on the terminal and in `metrics.jsonl`."""
        self.log_event("alert", step, {"text": redact(text)}, f"note: {text}")

    def alert(self, step: int, title: str, text: str) -> None:
        """Something a person should do something about: to the trackers too, which may send it to a telephone."""
        self.log_event("alert", step, {"title": title, "text": redact(text)}, f"alert: {text}")
        self.trackers.alert(title, text)

    def log_rollback(self, step: int) -> None:
        """The run is where it was after `step` steps: what was told beyond is void."""
        self.log_event("rollback", step, {"resumed_from": step}, f"went back to step {step}")
        self.trackers.rewind(step)

    def log_metrics(self, event: str, step: int, values: dict[str, Any], line: str = "") -> None:
        """The metrics of a `train` or `eval` line, to every logger."""
        self.log_event(event, step, values, line)
        self.trackers.log(values, step, event)

    def write_report(self, step: int) -> None:
        """The run has ended: its report, and what the trackers show at the end. A report that cannot be written is a note, no more."""
        if self.metrics is None:
            return
        report = self.run.path / "report.html"
        late = f"it takes more than {REPORT_SECONDS:g} seconds"
        problem = bounded(lambda: _write(self.run.path, report), REPORT_SECONDS, late)
        if problem:
            text = f"there is no report at the end of this run: {problem}; try dmoe report {self.run.path}"
            self.print(f"note: {text}")
            self.log_event("alert", step, {"text": text})
        self.trackers.finish(None if problem else report)

    def close(self) -> None:
        self.display.close()
        self.trackers.close()
        if self.metrics is not None:
            with suppress(OSError):  # what a full disk has kept back
                self.metrics.close()

    def _write_line(self, event: str, step: int, values: dict[str, Any]) -> None:
        """A disk that is full must not hide what the run has to say, nor end it: that is for the checkpoints to decide."""
        if self.metrics is None:
            return
        try:
            self.metrics.write(event, step, values)
        except OSError as error:
            if not self.lines_lost:
                self.print(
                    f"note: {self.run.metrics} cannot be written ({error.strerror}): lines are lost until it can"
                )
            self.lines_lost += 1


def _write(run: Path, report: Path) -> str | None:
    """Write the report; why it could not be, or None."""
    from dmoe.report import write_report  # what only the end of a run needs

    try:
        write_report([run], report)
    except Exception as error:  # whatever it is: the run is trained and saved
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None
