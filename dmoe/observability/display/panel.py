"""Status panel of a run as lines of text, fitted to the terminal: most important values first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.text import Text

from dmoe.observability.display.layer_table import CharSet, layer_table
from dmoe.observability.display.state import (
    DisplayState,
    format_clock,
    format_measures,
    format_value,
)
from dmoe.report.format import format_bytes
from dmoe.runs.metrics_log import finite, number

MAX_WIDTH = 160
SPARKLINE_WIDTH = 24
MAX_ALERTS = 2
MIN_BAR_WIDTH = 10
"""Smallest useful width of the bar of the step time, in characters."""
MAX_BAR_WIDTH = 40
GAP = "  "
STEP_TIME = "step_time"
"""Key of a step's seconds per part in a `train` line."""
ADVICE = "; what usually helps"
"""Start of the advice in an alert; the line printed above the panel has it in full."""
FIELDS = (
    ("accuracy", "accuracy", "{:.2%}"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
    ("grad norm", "grad_norm", "{:.3g}"),
    ("lr", "lr", "{:.2e}"),
    ("drop", "drop_rate", "{:.1%}"),
    ("ranks", "rank_max_over_mean", "{:.2f}x"),
    ("moved", "moves", "{:,.0f}"),
    ("mfu", "mfu", "{:.1%}"),
    ("straggler", "straggler", "{:.2f}x"),
    ("rows max/mean", "rank_imbalance", "{:.2f}"),
    ("copies", "copies", "{:,.0f}"),
)
"""Name, key in a `train` line, and format."""
PART_COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "white")
OMITTED_FIRST = ("more alerts", "time", "more values", "alert", "values")
"""Blocks to omit, in this order, until the table of layers has at least a heading and two rows."""
NamedValue = tuple[str, str, str]
"""Name, formatted value, and style."""


def panel_lines(
    state: DisplayState, now: float | None, width: int, height: int, charset: CharSet
) -> list[Text]:
    """Return the panel. The caller holds the state's lock.

    Args:
        state: the run.
        now: time in seconds by the clock of the state's events; None if unknown.
        width: characters per line at most.
        height: lines at most.
        charset: characters of the terminal.
    """
    width = min(width, MAX_WIDTH)
    values = _flow(_named_values(state, charset), width)
    alerts = _alerts(state, width, charset)
    blocks = {
        "head": [_progress(state, now, width, charset), *_status(state, width, charset)],
        "values": values[:1],
        "more values": values[1:],
        "time": _step_time(state.values.get(STEP_TIME), width, charset),
        "layers": [],
        "alert": alerts[:1],
        "more alerts": alerts[1:],
    }
    layers = state.values.get("layers")
    min_table = min(3, len(layers) + 1) if isinstance(layers, list) and layers else 0
    for name in OMITTED_FIRST:
        if _height(blocks) + min_table > height:
            blocks[name] = []
    blocks["layers"] = layer_table(layers, width, height - _height(blocks), charset)
    return [line for block in blocks.values() for line in block][:height]


def sparkline(values: Sequence[float | None], width: int, charset: CharSet) -> str:
    """Draw `values` as a curve from their lowest to their highest.

    Neighbours are averaged where there are more than `width`; a gap where all of them are None.
    """
    per_point = max(1.0, len(values) / width)
    points = [
        _mean(values[int(i * per_point) : int((i + 1) * per_point)])
        for i in range(min(width, len(values)))
    ]
    known = [point for point in points if point is not None]
    if not known:
        return ""
    low, span = min(known), max(known) - min(known)

    def char(point: float | None) -> str:
        if point is None:
            return " "
        return charset.levels[min(7, int((point - low) / span * 8)) if span > 0 else 3]

    return "".join(map(char, points))


def stacked_bar(parts: Sequence[float], width: int, charset: CharSet) -> Text:
    """Draw `parts` of a whole, in order; their lengths sum to `width` exactly."""
    total, bar, sum_before, end_before = sum(parts), Text(), 0.0, 0
    for index, part in enumerate(parts):
        sum_before += part
        end = round(width * sum_before / total) if total > 0 else 0
        bar.append(_part_char(index, charset) * (end - end_before), _part_colour(index))
        end_before = end
    return bar


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _part_char(index: int, charset: CharSet) -> str:
    return charset.parts[index % len(charset.parts)]


def _part_colour(index: int) -> str:
    return PART_COLOURS[index % len(PART_COLOURS)]


def _progress_bar(fraction: float, width: int, charset: CharSet) -> Text:
    done = int(width * min(1.0, max(0.0, fraction)))
    return Text.assemble((charset.done * done, "green"), (charset.left * (width - done), "dim"))


def _height(blocks: dict[str, list[Text]]) -> int:
    return sum(map(len, blocks.values()))


def _progress(state: DisplayState, now: float | None, width: int, charset: CharSet) -> Text:
    left = state.seconds_left(now)
    if state.total_steps is None:
        return _fitted(Text(f"step {state.step:,}", "bold"), width, charset)
    fraction = state.step / state.total_steps if state.total_steps else 1.0
    tail = f" {int(100 * fraction):3d}%"
    if left is not None and state.step < state.total_steps:
        tail += f"  left {format_clock(left)}"
    line = Text.assemble((f"step {state.step:,}/{state.total_steps:,} ", "bold"))
    bar_width = max(0, width - len(line) - len(tail))
    line.append_text(_progress_bar(fraction, bar_width, charset)).append(tail)
    return _fitted(line, width, charset)


def _status(state: DisplayState, width: int, charset: CharSet) -> list[Text]:
    if not state.status:
        return []
    return [_fitted(Text(charset.printable(state.status), "dim"), width, charset)]


def _named_values(state: DisplayState, charset: CharSet) -> Iterator[NamedValue]:
    values = state.values
    curve = sparkline([loss.value for loss in state.losses], SPARKLINE_WIDTH, charset)
    if "loss" in values:
        style = "bold" if finite(values["loss"]) is not None else "bold red"
        yield "loss", f"{format_value(values['loss'], '{:.3f}')} {curve}".rstrip(), style
    if "bits_per_byte" in values:
        yield "bits/byte", format_value(values["bits_per_byte"], "{:.3f}"), "bold"
    if state.evaluations:
        step, found = state.evaluations[-1]
        loss = f"loss {format_value(found.get('loss'), '{:.3f}')}"
        yield "validation", f"{', '.join(format_measures(found) or [loss])} at {step:,}", ""
    for name, key, template in FIELDS:
        if key in values:
            style = "red" if finite(values[key]) is None else ""
            yield name, format_value(values[key], template), style
    memory = number(values, "memory")
    if memory:
        yield "memory", format_bytes(memory), ""
    if state.saved_step:
        yield "saved", f"step {state.saved_step:,}", ""


def _flow(values: Iterable[NamedValue], width: int) -> list[Text]:
    """Fill each line with as many values as fit."""
    lines: list[Text] = []
    for name, text, style in values:
        value = Text.assemble((f"{name} ", "dim"), (text, style))
        if lines and len(lines[-1]) + len(GAP) + len(value) <= width:
            lines[-1].append(GAP).append_text(value)
        else:
            value.truncate(width)
            lines.append(value)
    return lines


def _step_time(step_time: Any, width: int, charset: CharSet) -> list[Text]:
    """Bar of the parts of a step, with names; only the longest where not all names fit."""
    found = step_time if isinstance(step_time, dict) else {}
    parts = {name: part for name in found if (part := number(found, name))}
    seconds = list(parts.values())
    total = sum(seconds)
    if total <= 0:
        return []
    labels = [
        f"{_part_char(index, charset)} {name} {part / total:.0%}"
        for index, (name, part) in enumerate(parts.items())
    ]
    title = "time "
    shown = sorted(range(len(labels)), key=lambda index: -seconds[index])
    while len(shown) > 1:
        if sum(len(labels[i]) + len(GAP) for i in shown) + MIN_BAR_WIDTH + len(title) <= width:
            break
        shown.pop()
    names = Text(GAP).join([Text(""), *(Text(labels[i], _part_colour(i)) for i in sorted(shown))])
    bar_width = max(1, min(MAX_BAR_WIDTH, width - len(names) - len(title)))
    bar = stacked_bar(seconds, bar_width, charset)
    return [_fitted(Text.assemble((title, "dim"), bar, names), width, charset)]


def _alerts(state: DisplayState, width: int, charset: CharSet) -> list[Text]:
    """Latest alerts, the newest first."""
    latest = list(state.alerts)[-MAX_ALERTS:][::-1]
    return [
        _fitted(
            Text(f"! step {step:,}: {charset.printable(text).split(ADVICE)[0]}", "yellow"),
            width,
            charset,
        )
        for step, text in latest
    ]


def _fitted(line: Text, width: int, charset: CharSet) -> Text:
    if line.cell_len > width:
        line.truncate(max(0, width - len(charset.cut)))
        line.append(charset.cut)
        line.truncate(width)
    return line
