"""Trackers, through accelerate: copies of metrics.jsonl. A run does not need them.

A run resumed after step s repeats the later steps. TensorBoard marks its older values beyond s as
void. wandb cannot take back a row: see `trackers/wandb.py`.

Scalars are sent with every logged step. Heat maps and tables of the load per expert are sent with
an evaluation and at the end, about `MAX_FIGURES` times per run: each shows the whole run so far.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dmoe.config.schema import Config
from dmoe.config.secrets import redact
from dmoe.observability import error_text
from dmoe.observability.trackers.by_accelerate import AccelerateTracker
from dmoe.observability.trackers.content import LoadHistory, scalars
from dmoe.observability.trackers.tensorboard import TensorBoardTracker
from dmoe.observability.trackers.wandb import WandbTracker
from dmoe.runs.directory import RunDir
from dmoe.runs.metrics_log import Line, read_metrics

__all__ = ["Trackers"]

MAX_FIGURES = 10
Tracker = TensorBoardTracker | WandbTracker | AccelerateTracker


class Trackers:
    """The trackers of `tracking.trackers`; none except on the main process."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: Config,
        run: RunDir,
        *,
        first_step: int = 0,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        """Open the trackers.

        Args:
            accelerator: gets the list of open trackers.
            config: of the run; wandb records it.
            run: run directory.
            first_step: steps already done, 0 for a new run.
            notify: receives one line where a tracker cannot do what the config says.
        """
        self.accelerator, self.config, self.run = accelerator, config, run
        self.notify = notify or _print_to_stderr
        self._open(first_step)

    def log(self, values: dict[str, Any], step: int, event: str = "train") -> None:
        """Send the numbers of a `train` or `eval` line to every tracker.

        A tracker that raises is removed, with one line to `notify`.
        """
        self.step = step
        if not self.accelerator.trackers:
            return
        self._for_each(lambda tracker: tracker.log(scalars(values, event), step=step))
        if event == "train":
            self.load_history.add(step, values)
        elif step - self.last_figures >= self.config.train.steps / MAX_FIGURES:
            self._log_figures()

    def alert(self, title: str, text: str) -> None:
        """Send an alert: a message from wandb, a text in TensorBoard."""
        title, text = redact(title), redact(text)
        self._for_each(lambda tracker: tracker.alert(title, text, self.step))

    def rollback(self, step: int) -> None:
        """Make void what was logged beyond `step`: this process rolled back the run."""
        self.close()
        self._open(step)

    def finish(self, report: Path | None) -> None:
        """Send the last figures, and the report to wandb. Takes seconds at most."""
        if self.last_figures != self.step:
            self._log_figures()
        if report is not None:
            self._for_each(lambda tracker: self._upload_report(tracker, report))

    def close(self) -> None:
        """Close all trackers.

        Not by `Accelerator.end_training`: it destroys the process group, which the last barrier
        still needs.
        """
        self._for_each(lambda tracker: tracker.finish())

    def _open(self, first_step: int) -> None:
        self.step = self.last_figures = first_step
        names = self.config.tracking.trackers if self.accelerator.is_main_process else []
        past = self._read_past(first_step) if names and first_step else []
        self.load_history = LoadHistory(past)
        if self.accelerator.is_main_process:
            opened = [self._open_tracker(name, first_step, past) for name in names]
            self.accelerator.trackers = [tracker for tracker in opened if tracker is not None]

    def _read_past(self, first_step: int) -> list[Line]:
        """Valid lines up to `first_step`."""
        try:
            return [line for line in read_metrics(self.run.metrics) if line["step"] <= first_step]
        except Exception as error:
            self.notify(
                f"{self.run.metrics.name} cannot be read; the trackers may lack earlier steps: "
                f"{redact(error_text(error))}"
            )
            return []

    def _open_tracker(self, name: str, first_step: int, past: list[Line]) -> Tracker | None:
        try:
            if name == "tensorboard":
                return TensorBoardTracker.open(self.run, first_step)
            if name != "wandb":
                return AccelerateTracker.open(name, self.config, self.run)
            if self.config.tracking.wandb_mode != "disabled":
                return WandbTracker.open(self.config, self.run, past, self.notify)
        # Training continues whatever a tracker raises.
        except Exception as error:
            reason = redact(error_text(error))
            self.notify(f"{name} could not be started; the run continues without it: {reason}")
        return None

    def _log_figures(self) -> None:
        self.last_figures = self.step
        if self.load_history.layers:
            self._for_each(lambda tracker: tracker.log_figures(self.load_history, self.step))

    def _upload_report(self, tracker: Tracker, report: Path) -> None:
        problem = tracker.upload_report(report) if isinstance(tracker, WandbTracker) else None
        if problem:
            self.notify(f"{tracker.name} did not receive the report {report}: {redact(problem)}")

    def _for_each(self, action: Callable[[Tracker], None]) -> None:
        if not self.accelerator.is_main_process:
            return
        for tracker in list(self.accelerator.trackers):
            try:
                action(tracker)
            # A full disk, a killed service: metrics.jsonl still has every number.
            except Exception as error:
                self.accelerator.trackers.remove(tracker)
                self.notify(
                    f"{tracker.name} failed after step {self.step}; the run continues without it: "
                    f"{redact(error_text(error))}"
                )


def _print_to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
