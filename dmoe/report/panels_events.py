"""What happened: events as a table and as marks in the curves, and the text samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dmoe.report.format import format_duration, format_number, format_utc
from dmoe.report.page import Panel, Quote, Table
from dmoe.report.run import Run
from dmoe.runs.metrics_log import Line, finite

MEASURES = ("train", "eval")
HEAD = ("event", "step", "time", "text", "title", "sample", "data", "attempt")
ROWS = 500
"""Of the table; saves go first where there are more, since they are all alike."""
MARKS = 300
LONGEST = 600
"""Letters of one cell."""
QUOTES = 8


def kind(line: Line) -> str:
    """What the line is called: a skipped step is an alert in the file, and something else to a reader."""
    text = line.get("text")
    if line["event"] != "alert":
        return str(line["event"])
    return (
        "skip"
        if isinstance(text, str) and "skipped" in text
        else "alert"
        if "title" in line
        else "note"
    )


def details(line: Line) -> str:
    """The text of the line, then its other plain values."""
    parts = [line["text"]] if isinstance(line.get("text"), str) else []
    for name, value in line.items():
        if name in HEAD or isinstance(value, dict | list):
            continue
        number = finite(value)
        said = (
            format_duration(number)
            if name == "seconds"
            else format_number(number)
            if number is not None
            else str(value)
        )
        parts.append(f"{name.replace('_', ' ')} {said}")
    text = "; ".join(parts)
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


def marks(run: Run) -> list[dict[str, Any]]:
    """`{kind, step, text}` for the curves. The start is no news; of many marks of a kind the last ones stay."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in run.metrics.lines:
        if line["event"] not in (*MEASURES, "start"):
            found.setdefault(kind(line), []).append(
                {"kind": kind(line), "step": line["step"], "text": details(line)[:200]}
            )
    return [mark for group in found.values() for mark in group[-MARKS:]]


def events(runs: Sequence[Run]) -> Panel:
    tables, words = [], []
    for run in runs:
        happened = [(line, False) for line in run.metrics.lines if line["event"] not in MEASURES]
        happened += [(line, True) for line in run.metrics.void if line["event"] not in MEASURES]
        happened.sort(key=lambda pair: finite(pair[0].get("time")) or 0.0)
        if len(happened) > ROWS:
            rare = [pair for pair in happened if kind(pair[0]) != "checkpoint"][-ROWS:]
            words.append(
                f"{run.name}: of {len(happened):,} events the last {len(rare)} are shown, without the saves."
            )
            happened = rare
        if happened:
            tables.append(
                Table(
                    f"Events of {run.name}",
                    ["Event", "Step", "Details", "Time (UTC)"],
                    [_row(*pair) for pair in happened],
                )
            )
        words += _damage(run)
    return Panel(
        "events", "Events", words if tables or words else ["No event was recorded."], tables=tables
    )


def _row(line: Line, undone: bool) -> list[str]:
    said = details(line)
    note = "undone by a later restart" if undone else ""
    return [
        kind(line),
        f"{line['step']:,}",
        "; ".join(part for part in (said, note) if part),
        format_utc(finite(line.get("time"))),
    ]


def _damage(run: Run) -> list[str]:
    words = []
    if run.metrics.unreadable:
        words.append(
            f"{run.name}: {run.metrics.unreadable} line(s) of metrics.jsonl could not be read and are left out."
        )
    measured = sum(line["event"] in MEASURES for line in run.metrics.void)
    if measured:
        words.append(
            f"{run.name}: {measured} measurement(s) of steps that a restart repeated are left out of the curves."
        )
    return words


def samples(runs: Sequence[Run]) -> Panel:
    """What the model wrote, newest first. Old runs printed it to the terminal only."""
    quotes = []
    for run in runs:
        lines = [
            line
            for line in run.metrics.lines
            if isinstance(line.get("sample"), str) and line["sample"]
        ]
        for line in reversed(lines[-QUOTES:]):
            title = f"After step {line['step']:,}"
            quotes.append(
                Quote(
                    f"{run.name}, {title[0].lower()}{title[1:]}" if len(runs) > 1 else title,
                    line["sample"][:20_000],
                )
            )
    return Panel(
        "samples", "Text samples", [] if quotes else ["No sample was recorded."], quotes=quotes
    )
