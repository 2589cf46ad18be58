"""A run's events as lines of plain text, and numbers as the panel and the lines spell them."""

from __future__ import annotations

from typing import Any

from dmoe.observability.display.state import DisplayState
from dmoe.runs.metrics_log import finite

NOT_FINITE = "not finite"
"""A number that is NaN or infinite; `metrics.jsonl` holds null for both."""
FIGURES = {
    "loss": ("loss {}", "{:.3f}"),
    "bits_per_byte": ("bits/byte {}", "{:.3f}"),
    "accuracy": ("accuracy {}", "{:.2%}"),
    "tokens_per_second": ("{} tokens/s", "{:,.0f}"),
    "drop_rate": ("dropped {}", "{:.1%}"),
    "load_max_over_mean": ("load max/mean {}", "{:.2f}"),
}


MEASURES = {"bits_per_byte": "{:.3f} bits/byte", "accuracy": "{:.2%} right"}


def measure_words(name: str, value: float) -> str:
    """What an evaluation found, as a person says it."""
    return figure(value, MEASURES[name])


def measured_words(values: dict[str, Any]) -> list[str]:
    """All of that in one `eval` line."""
    return [measure_words(name, values[name]) for name in MEASURES if name in values]


def figure(value: Any, form: str) -> str:
    number = finite(value)
    return NOT_FINITE if number is None else form.format(number)


def clock_time(seconds: float) -> str:
    """`0:07`, `12:30`, `1:05:00`, `3 d 04:00`."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def train_words(state: DisplayState, now: float | None) -> str:
    """`step 3/6  loss 4.210  ...  left 0:12`, with what was told; what was not is left out."""
    values, left = state.values, state.left(now)
    planned = "" if state.steps is None else f"/{state.steps}"
    told = [
        name.format(figure(values[key], form))
        for key, (name, form) in FIGURES.items()
        if key in values
    ]
    return "  ".join(
        [
            f"step {state.step}{planned}",
            *told,
            *([] if left is None or state.step == state.steps else [f"left {clock_time(left)}"]),
        ]
    )


def event_words(event: str, step: int, values: dict[str, Any]) -> str:
    """A line of `metrics.jsonl` in the words of the run that wrote it; empty for one that needs none, or has a display of its own."""
    if event == "start":
        return "the run has started"
    if event == "restart":
        return f"the run was resumed after step {step}"
    if event == "rollback":
        return f"went back to step {step}"
    if event == "alert":
        return f"{'alert' if 'title' in values else 'note'}: {values.get('text', '')}"
    if event == "eval":
        return ", ".join(
            [
                f"step {step}: held-out loss {figure(values.get('loss'), '{:.3f}')}",
                *measured_words(values),
            ]
        )
    if event == "end":
        if values.get("failed"):
            return f"the run was ended by an error after step {step}"
        return (
            f"stopped after step {step}, which is saved"
            if values.get("stopped")
            else f"the run has ended after step {step}"
        )
    return ""
