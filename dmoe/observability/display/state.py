"""State of a run as shown in the terminal, and its one-line texts.

Fed by the run itself, or by `dmoe watch` from the metrics file.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, NamedTuple

from dmoe.runs.metrics_log import finite, last_valid_step

KEPT_LOSSES = 4096
"""Losses for the sparkline."""
KEPT_LINES = 32
"""Whole `train` lines kept, so that after a rollback the last valid one can be shown."""
NOT_FINITE = "not finite"
"""Text of NaN and infinity; `metrics.jsonl` has null for both."""
TRAIN_FIELDS = {
    "loss": ("loss {}", "{:.3f}"),
    "bits_per_byte": ("bits/byte {}", "{:.3f}"),
    "accuracy": ("accuracy {}", "{:.2%}"),
    "tokens_per_second": ("{} tokens/s", "{:,.0f}"),
    "drop_rate": ("dropped {}", "{:.1%}"),
    "load_max_over_mean": ("load max/mean {}", "{:.2f}"),
    "rank_max_over_mean": ("ranks {}", "{:.2f}"),
    "moves": ("moved {}", "{:,.0f}"),
}
"""Values of a `train` line shown in a plain line: text around the number, and its format."""
EVAL_MEASURES = {"bits_per_byte": "{:.3f} bits/byte", "accuracy": "{:.2%} accuracy"}
"""Measures of an `eval` line besides the loss."""


class StepValue(NamedTuple):
    step: int
    value: Any


class DisplayState:
    """Latest values of a run. Written by one thread, drawn by another.

    Hold `lock` to read more than one attribute.
    """

    def __init__(self, total_steps: int | None, start: int = 0) -> None:
        self.lock = threading.RLock()
        self.total_steps = total_steps
        """Last planned step; None if unknown."""
        self.status = ""
        """Status line of `dmoe watch`; empty in the run itself."""
        self._first_timed: tuple[int, float] | None = None
        """First step with a known time in this attempt, and that time."""
        self._last_timed: tuple[int, float] | None = None
        self.reset(start)

    def reset(self, start: int = 0) -> None:
        """Forget all events."""
        with self.lock:
            self.step, self.saved_step = start, 0
            self.has_events = False
            self.ended = ""
            """`ended`, `stopped` or `failed` after the `end` line."""
            self.train_lines: deque[StepValue] = deque(maxlen=KEPT_LINES)
            self.losses: deque[StepValue] = deque(maxlen=KEPT_LOSSES)
            self.evaluations: deque[StepValue] = deque(maxlen=KEPT_LINES)
            self.alerts: deque[StepValue] = deque(maxlen=8)
            self._reset_pace()

    @property
    def values(self) -> dict[str, Any]:
        """The last valid `train` line; empty before the first."""
        return self.train_lines[-1].value if self.train_lines else {}

    def on_step(self, step: int, now: float | None) -> None:
        """Record that `step` steps are done at time `now` of a monotonic clock, None if unknown."""
        with self.lock:
            self.step = step
            if now is not None:
                self._first_timed = self._first_timed or (step, now)
                self._last_timed = (step, now)

    def on_event(self, event: str, step: int, values: dict[str, Any], now: float | None) -> None:
        """Record one line of `metrics.jsonl`, and drop earlier ones that it makes void.

        Args:
            event: kind of the line, e.g. `train`.
            step: its step.
            values: its other values.
            now: time in seconds by a monotonic clock; None if unknown.
        """
        with self.lock:
            self.has_events = True
            last = last_valid_step(event, step, values)
            if last is not None:
                self._roll_back(last)
            if event == "train":
                self.train_lines.append(StepValue(step, values))
                self.losses.append(StepValue(step, finite(values.get("loss"))))
            elif event == "eval":
                self.evaluations.append(StepValue(step, values))
            elif event == "checkpoint":
                self.saved_step = step
            elif event == "alert":
                self.alerts.append(StepValue(step, str(values.get("text", ""))))
            elif event == "end":
                self.step = step
                self.ended = next(
                    (key for key in ("stopped", "failed") if values.get(key)), "ended"
                )
            if event in ("train", "eval"):
                self.on_step(step, now)

    def seconds_left(self, now: float | None) -> float | None:
        """Return the time to the last step at the pace of this attempt, evaluations included.

        None if no pace is known yet.
        """
        if self.total_steps is None or now is None:
            return None
        if self._first_timed is None or self._last_timed is None:
            return None
        (first, first_time), (last, last_time) = self._first_timed, self._last_timed
        if last <= first:
            return None
        seconds_per_step = (last_time - first_time) / (last - first)
        return max(0.0, seconds_per_step * (self.total_steps - last) - (now - last_time))

    def _roll_back(self, last: int) -> None:
        """Drop values beyond step `last`; -1 drops step 0 too."""
        self.step, self.ended = max(0, last), ""
        for values in (self.train_lines, self.losses, self.evaluations):
            while values and values[-1].step > last:
                values.pop()
        self._reset_pace()

    def _reset_pace(self) -> None:
        """Forget the pace: another process, perhaps another machine, trains now."""
        self._first_timed = self._last_timed = None


def format_value(value: Any, template: str) -> str:
    """Format a number of a metrics line; `not finite` for null."""
    found = finite(value)
    return NOT_FINITE if found is None else template.format(found)


def format_measure(name: str, value: float) -> str:
    """Format one measure of an evaluation, e.g. `1.850 bits/byte`."""
    return format_value(value, EVAL_MEASURES[name])


def format_measures(values: dict[str, Any]) -> list[str]:
    """Format all measures of an `eval` line besides the loss."""
    return [format_measure(name, values[name]) for name in EVAL_MEASURES if name in values]


def format_clock(seconds: float) -> str:
    """Format a duration: `0:07`, `12:30`, `1:05:00`, `3 d 04:00`."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def train_text(state: DisplayState, now: float | None) -> str:
    """Return the latest `train` line as text: `step 3/6  loss 4.210  ...  left 0:12`."""
    values, left = state.values, state.seconds_left(now)
    parts = [f"step {state.step}" + ("" if state.total_steps is None else f"/{state.total_steps}")]
    parts += [
        text.format(format_value(values[key], template))
        for key, (text, template) in TRAIN_FIELDS.items()
        if key in values
    ]
    if left is not None and state.step != state.total_steps:
        parts.append(f"left {format_clock(left)}")
    return "  ".join(parts)


def event_text(event: str, step: int, values: dict[str, Any]) -> str:
    """Return a line of `metrics.jsonl` as text; empty for `train` and `checkpoint`."""
    if event == "start":
        return "the run has started"
    if event == "restart":
        if not step:
            return "the run has started again from the beginning"
        return f"the run was resumed after step {step}"
    if event == "rollback":
        return f"rolled back to step {step}"
    if event == "alert":
        return f"{'alert' if 'title' in values else 'note'}: {values.get('text', '')}"
    if event == "eval":
        loss = f"step {step}: validation loss {format_value(values.get('loss'), '{:.3f}')}"
        return ", ".join([loss, *format_measures(values)])
    if event == "end":
        if values.get("failed"):
            return f"the run was ended by an error after step {step}"
        if values.get("stopped"):
            return f"stopped after step {step}, which is saved"
        return f"the run has ended after step {step}"
    return ""
