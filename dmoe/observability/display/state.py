"""What is known of a run at this moment, from what it told so far. Fed by the run itself, or from its metrics file by `dmoe watch`."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, NamedTuple

from dmoe.runs.metrics_log import finite

REMEMBERED = 4096
"""Losses for the small curve."""
BACK = 32
"""Whole `train` lines kept, so that after a restart the last one in force can be shown."""


class Mark(NamedTuple):
    step: int
    value: Any


class DisplayState:
    """Written by one thread and drawn by another: hold `lock` to read more than one field."""

    def __init__(self, steps: int | None, start: int = 0) -> None:
        self.lock = threading.RLock()
        self.steps = steps
        """Planned; None where that is not known."""
        self.status = ""
        """How the run does, in the words of one who watches it; empty in the run itself."""
        self._began: tuple[int, float] | None = None
        """A step done in this attempt, and when."""
        self._latest: tuple[int, float] | None = None
        self.clear(start)

    def clear(self, start: int = 0) -> None:
        """Nothing was told yet."""
        with self.lock:
            self.step, self.saved = start, 0
            self.told_anything = False
            self.ended = ""
            """`ended`, `stopped` or `failed` after the line that says so."""
            self.lines: deque[Mark] = deque(maxlen=BACK)
            self.losses: deque[Mark] = deque(maxlen=REMEMBERED)
            self.held_out: deque[Mark] = deque(maxlen=BACK)
            self.alerts: deque[Mark] = deque(maxlen=8)
            self._paced()

    @property
    def values(self) -> dict[str, Any]:
        """The last `train` line in force; empty before the first."""
        return self.lines[-1].value if self.lines else {}

    def reached(self, step: int, now: float | None) -> None:
        """`step` steps are done; `now` by any steady clock, None where the time is not known."""
        with self.lock:
            self.step = step
            if now is not None:
                self._began = self._began or (step, now)
                self._latest = (step, now)

    def on_event(self, event: str, step: int, values: dict[str, Any], now: float | None) -> None:
        """One line of `metrics.jsonl`. A line with `resumed_from: s` makes what was told beyond step s void; a process that starts
        from nothing, step 0 too, as in `metrics_file`."""
        with self.lock:
            self.told_anything = True
            if isinstance(values.get("resumed_from"), int):
                self._void(
                    values["resumed_from"],
                    afresh=event != "rollback" and values["resumed_from"] == 0,
                )
            if event == "train":
                self.lines.append(Mark(step, values))
                self.losses.append(Mark(step, finite(values.get("loss"))))
            elif event == "eval":
                self.held_out.append(Mark(step, values))
            elif event == "checkpoint":
                self.saved = step
            elif event == "alert":
                self.alerts.append(Mark(step, str(values.get("text", ""))))
            elif event == "end":
                self.step, self.ended = (
                    step,
                    next((how for how in ("stopped", "failed") if values.get(how)), "ended"),
                )
            if event in ("train", "eval"):
                self.reached(step, now)

    def left(self, now: float | None) -> float | None:
        """Seconds to the last step at the pace of this attempt, evaluations included; None where no pace is known yet."""
        if self.steps is None or now is None or self._began is None or self._latest is None:
            return None
        (first, began), (last, told) = self._began, self._latest
        return (
            max(0.0, (told - began) / (last - first) * (self.steps - last) - (now - told))
            if last > first
            else None
        )

    def _void(self, back: int, afresh: bool) -> None:
        self.step, self.ended = back, ""
        for told in (self.lines, self.losses, self.held_out):
            while told and (afresh or told[-1].step > back):
                told.pop()
        self._paced()

    def _paced(self) -> None:
        """The pace is measured anew: another process, perhaps another machine."""
        self._began = self._latest = None
