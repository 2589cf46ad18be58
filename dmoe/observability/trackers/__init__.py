"""wandb and TensorBoard, through accelerate. They repeat what metrics.jsonl holds, and a run does not depend on them.

A run that goes on after step s does the steps beyond s again. TensorBoard is told that what it has beyond s is void. wandb cannot take
a row back: `wandb_run.py` says how its rows stay single.

Scalars go with every logged step. Heat-maps and tables of the experts' load go with an evaluation and the end, and at most `PICTURES`
times a run: each shows the whole run so far, so a later one replaces those before it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dmoe.config.schema import Config
from dmoe.config.secrets import redact
from dmoe.observability.trackers.load_history import LoadHistory
from dmoe.observability.trackers.names import scalars
from dmoe.observability.trackers.tensorboard import TensorBoardRun
from dmoe.observability.trackers.wandb import WandbRun
from dmoe.runs.directory import RunDir
from dmoe.runs.metrics_log import read_metrics

__all__ = ["Trackers"]

PICTURES = 10
Tracker = TensorBoardRun | WandbRun


class Trackers:
    """The trackers that `tracking.trackers` names, on the main process only."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: Config,
        run: RunDir,
        *,
        first_step: int = 0,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """`first_step`: steps that are done, 0 for a new run. `say` gets one line where a tracker does other than the config says."""
        self.accelerator, self.config, self.run = accelerator, config, run
        self.say = say or _to_stderr
        self._open(first_step)

    def log(self, values: dict[str, Any], step: int, event: str = "train") -> None:
        """Hand the numbers of a `train` or `eval` line to every tracker. One that raises is left out from then on, with one line."""
        self.step = step
        if not self.accelerator.trackers:
            return
        self._each(lambda tracker: tracker.log(scalars(values, event), step=step))
        if event == "train":
            self.loads.add(step, values)
        elif step - self.drawn >= self.config.train.steps / PICTURES:
            self._draw()

    def alert(self, title: str, text: str) -> None:
        """Something a person should look at: a message from wandb, a text in TensorBoard."""
        title, text = redact(title), redact(text)
        self._each(lambda tracker: tracker.alert(title, text, self.step))

    def rewind(self, step: int) -> None:
        """The run went back to where it was after `step` steps, in this process: what was logged beyond is void."""
        self.close()
        self._open(step)

    def finish(self, report: Path | None) -> None:
        """The run has ended: the last pictures, and the report for those that can hold a file. Seconds at most."""
        if self.drawn != self.step:
            self._draw()
        if report is not None:
            self._each(lambda tracker: self._hand_over(tracker, report))

    def close(self) -> None:
        """Not `Accelerator.end_training`: it destroys the process group, which the last barrier still needs."""
        self._each(lambda tracker: tracker.finish())

    def _open(self, first_step: int) -> None:
        self.step = self.drawn = first_step
        wanted = self.config.tracking.trackers if self.accelerator.is_main_process else []
        past = self._past(first_step) if wanted and first_step else []
        self.loads = LoadHistory(past)
        if self.accelerator.is_main_process:
            opened = [self._open_one(name, first_step, past) for name in wanted]
            self.accelerator.trackers = [tracker for tracker in opened if tracker is not None]

    def _past(self, first_step: int) -> list[dict[str, Any]]:
        """The lines in force up to the step at which the run goes on."""
        try:
            return [line for line in read_metrics(self.run.metrics) if line["step"] <= first_step]
        except Exception as error:
            self.say(
                f"{self.run.metrics.name} cannot be read back, and the trackers may miss what it holds: {_reason(error)}"
            )
            return []

    def _open_one(self, name: str, first_step: int, past: list[dict[str, Any]]) -> Tracker | None:
        try:
            if name == "tensorboard":
                return TensorBoardRun.open(self.run, first_step)
            if self.config.tracking.wandb_mode != "disabled":
                return WandbRun.open(self.config, self.run, past, self.say)
        except Exception as error:  # whatever a tracker does, training goes on
            self.say(
                f"{name} could not be started, and the run goes on without it: {_reason(error)}"
            )
        return None

    def _draw(self) -> None:
        self.drawn = self.step
        if self.loads.layers:
            self._each(lambda tracker: tracker.draw(self.loads, self.step))

    def _hand_over(self, tracker: Tracker, report: Path) -> None:
        problem = tracker.hand_over(report) if isinstance(tracker, WandbRun) else None
        if problem:
            self.say(
                f"{tracker.name} did not get the report, which is in {report}: {redact(problem)}"
            )

    def _each(self, do: Callable[[Tracker], None]) -> None:
        if not self.accelerator.is_main_process:
            return
        for tracker in list(self.accelerator.trackers):
            try:
                do(tracker)
            except (
                Exception
            ) as error:  # a full disk, a service that was killed: metrics.jsonl has every number
                self.accelerator.trackers.remove(tracker)
                self.say(
                    f"{tracker.name} failed after step {self.step}, and the run goes on without it: {_reason(error)}"
                )


def _reason(error: Exception) -> str:
    return redact(" ".join(str(error).split()) or type(error).__name__)[:200]


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
