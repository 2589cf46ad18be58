"""The whole panel as lines: what matters most first, as much as the terminal has room for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.text import Text

from dmoe.observability.display.bars import (
    CharSet,
    part_glyph,
    part_style,
    parts_bar,
    progress_bar,
    sparkline,
)
from dmoe.observability.display.format import clock_time, figure, measured_words
from dmoe.observability.display.layer_table import layer_table
from dmoe.observability.display.state import DisplayState
from dmoe.report.format import format_bytes
from dmoe.runs.metrics_log import finite, number

WIDEST = 160
CURVE = 24
ALERTS = 2
SHORTEST = 10
"""Characters the bar of times is worth having."""
GAP = "  "
SPLIT = "step_time"
"""The key of a step's seconds by part."""
ADVICE = "; what usually helps"
"""Where an alert goes on to what to do: the line that was said above the panel has it in full."""
FIGURES = (
    ("accuracy", "accuracy", "{:.2%}"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
    ("grad norm", "grad_norm", "{:.3g}"),
    ("lr", "lr", "{:.2e}"),
    ("drop", "drop_rate", "{:.1%}"),
    ("mfu", "mfu", "{:.1%}"),
    ("straggler", "straggler", "{:.2f}x"),
)
Fact = tuple[str, str, str]
"""A name, its figure, and its style."""


DROP_FIRST = ("more alerts", "time", "more facts", "alert", "facts")
"""What goes, in this order, where the table of layers would not get a heading, a row, and a word on the rest."""


def panel_lines(
    state: DisplayState, now: float | None, width: int, height: int, glyphs: CharSet
) -> list[Text]:
    """At most `height` lines of at most `width` characters. Call it with the state's lock held."""
    width = min(width, WIDEST)
    facts, alerts = _flow(_facts(state, glyphs), width), _alerts(state, width, glyphs)
    blocks = {
        "head": [_progress(state, now, width, glyphs), *_status(state, width, glyphs)],
        "facts": facts[:1],
        "more facts": facts[1:],
        "time": _time_split(state.values.get(SPLIT), width, glyphs),
        "layers": [],
        "alert": alerts[:1],
        "more alerts": alerts[1:],
    }
    layers = state.values.get("layers")
    least = min(3, len(layers) + 1) if isinstance(layers, list) and layers else 0
    for name in DROP_FIRST:
        if _height(blocks) + least > height:
            blocks[name] = []
    blocks["layers"] = layer_table(layers, width, height - _height(blocks), glyphs)
    return [line for block in blocks.values() for line in block][:height]


def _height(blocks: dict[str, list[Text]]) -> int:
    return sum(map(len, blocks.values()))


def _progress(state: DisplayState, now: float | None, width: int, glyphs: CharSet) -> Text:
    left = state.left(now)
    if state.steps is None:
        return _fitted(Text(f"step {state.step:,}", "bold"), width, glyphs)
    share = state.step / state.steps if state.steps else 1.0
    words = f" {int(100 * share):3d}%" + (
        f"  left {clock_time(left)}" if left is not None and state.step < state.steps else ""
    )
    line = Text.assemble((f"step {state.step:,}/{state.steps:,} ", "bold"))
    line.append_text(progress_bar(share, max(0, width - len(line) - len(words)), glyphs)).append(
        words
    )
    return _fitted(line, width, glyphs)


def _status(state: DisplayState, width: int, glyphs: CharSet) -> list[Text]:
    return (
        [_fitted(Text(glyphs.spelled(state.status), "dim"), width, glyphs)] if state.status else []
    )


def _facts(state: DisplayState, glyphs: CharSet) -> Iterator[Fact]:
    values = state.values
    curve = sparkline([mark.value for mark in state.losses], CURVE, glyphs)
    if "loss" in values:
        style = "bold" if finite(values["loss"]) is not None else "bold red"
        yield "loss", f"{figure(values['loss'], '{:.3f}')} {curve}".rstrip(), style
    if "bits_per_byte" in values:
        yield "bits/byte", figure(values["bits_per_byte"], "{:.3f}"), "bold"
    if state.held_out:
        step, told = state.held_out[-1]
        words = measured_words(told) or [f"loss {figure(told.get('loss'), '{:.3f}')}"]
        yield "held out", f"{', '.join(words)} at {step:,}", ""
    for name, key, form in FIGURES:
        if key in values:
            yield name, figure(values[key], form), "red" if finite(values[key]) is None else ""
    memory = number(values, "memory")
    if memory:
        yield "memory", format_bytes(memory), ""
    if state.saved:
        yield "saved", f"step {state.saved:,}", ""


def _flow(facts: Iterable[Fact], width: int) -> list[Text]:
    """As many a line as fit."""
    lines: list[Text] = []
    for name, words, style in facts:
        fact = Text.assemble((f"{name} ", "dim"), (words, style))
        if lines and len(lines[-1]) + len(GAP) + len(fact) <= width:
            lines[-1].append(GAP).append_text(fact)
        else:
            fact.truncate(width)
            lines.append(fact)
    return lines


def _time_split(split: Any, width: int, glyphs: CharSet) -> list[Text]:
    """A bar of the parts of a step, and what each is; the longest only, where not all names fit."""
    parts = (
        {name: part for name in split if (part := number(split, name))}
        if isinstance(split, dict)
        else {}
    )
    whole = sum(parts.values())
    if whole <= 0:
        return []
    named = [
        f"{part_glyph(place, glyphs)} {name} {part / whole:.0%}"
        for place, (name, part) in enumerate(parts.items())
    ]
    order = sorted(range(len(named)), key=lambda place: -list(parts.values())[place])
    while (
        len(order) > 1
        and sum(len(named[place]) + len(GAP) for place in order) + SHORTEST + len("time ") > width
    ):
        order.pop()
    names = Text(GAP).join(
        [Text(""), *(Text(named[place], part_style(place)) for place in sorted(order))]
    )
    bar = parts_bar(
        list(parts.values()), max(1, min(40, width - len(names) - len("time "))), glyphs
    )
    return [_fitted(Text.assemble(("time ", "dim"), bar, names), width, glyphs)]


def _alerts(state: DisplayState, width: int, glyphs: CharSet) -> list[Text]:
    """The newest first."""
    told = list(state.alerts)[-ALERTS:][::-1]
    lines = [
        Text(f"! step {step:,}: {glyphs.spelled(text).split(ADVICE)[0]}", "yellow")
        for step, text in told
    ]
    return [_fitted(line, width, glyphs) for line in lines]


def _fitted(line: Text, width: int, glyphs: CharSet) -> Text:
    if line.cell_len > width:
        line.truncate(max(0, width - len(glyphs.cut)))
        line.append(glyphs.cut)
        line.truncate(width)
    return line
