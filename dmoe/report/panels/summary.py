"""Panels of what a run is and did: key numbers, settings, events and text samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dmoe.report.data_time import data_share
from dmoe.report.format import (
    NOT_RECORDED,
    format_bytes,
    format_count,
    format_duration,
    format_number,
    format_percent,
    format_utc,
    plural,
)
from dmoe.report.lost import lost_lines, unused_lines
from dmoe.report.overview import count_alerts, describe_commit
from dmoe.report.page import Panel, Table, TextBlock
from dmoe.report.run import (
    Run,
    describe_end,
    last_number,
    metric_name,
    summarize,
)
from dmoe.report.sentences import config_sentences
from dmoe.runs.metrics_log import Line, finite, number

EVENT_NAMES = {"held": "training waited"}
"""Words for fields of an event whose names say too little."""
EVENT_FIELDS = ("event", "step", "time", "text", "title", "sample", "data", "attempt")
"""Fields that are not listed among the details of an event."""
MAX_EVENTS = 500
"""Rows of the event table; checkpoints and evaluations, all alike, are left out first."""
MARKED = ("alert", "skip", "restart", "rollback")
"""Kinds of events that curves show."""
MAX_MARKS = 300
"""Marks of each kind in the curves."""
MAX_DETAILS = 600
"""Characters per cell."""
MAX_MARK_TEXT = 200
MAX_SAMPLES = 8
MAX_SAMPLE_TEXT = 20_000


def summary_panel(runs: Sequence[Run]) -> Panel:
    """Build key numbers, the settings in sentences, and the settings that differ."""
    names = [run.name for run in runs]
    rows = [[label, *(form(run) for run in runs)] for label, form in KEY_NUMBERS.items()]
    recorded = [row for row in rows if any(cell != NOT_RECORDED for cell in row[1:])]
    tables = [Table("Key numbers", ["", *names], recorded)]
    lists = _settings(runs)
    problems = [f"{run.name}: {run.config_problem}" for run in runs if run.config is None]
    return Panel("summary", "Key numbers and settings", problems, lists=lists, tables=tables)


def _settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the sentences on the settings: those that all runs share once, then the others."""
    by_run = {
        run.name: config_sentences(run.config, run.start) for run in runs if run.config is not None
    }
    if len(by_run) < 2:
        return {"Settings": next(iter(by_run.values()))} if by_run else {}
    first, *others = by_run.values()
    common = [text for text in first if all(text in other for other in others)]
    lists = {"Settings of all runs": common} if common else {}
    for name, sentences in by_run.items():
        if own := [text for text in sentences if text not in common]:
            lists[f"Settings of {name}"] = own
    return lists


def _state(run: Run) -> str:
    failed = run.end is not None and run.end.get("failed")
    return describe_end(run) + ("; see Events" if failed else "")


def _validation(run: Run) -> str:
    """Return the last validation metric, and the best one if that was earlier."""
    name = metric_name(run.evals[-1]) if run.evals else "loss"
    found = [
        (value, line["step"]) for line in run.evals if (value := number(line, name)) is not None
    ]
    if not found:
        return NOT_RECORDED
    form = METRIC_FORMATS[name]
    last = found[-1][0]
    best, step = max(found) if name == "accuracy" else min(found)
    return form(last) + (f" (best {form(best)} at step {step:,})" if best != last else "")


METRIC_FORMATS: dict[str, Callable[[float], str]] = {
    "bits_per_byte": lambda bits: f"{bits:.4g} bits per byte",
    "accuracy": lambda share: f"{format_percent(share)} accuracy",
    "loss": lambda nats: f"loss {nats:.4g}",
}


def _speed(run: Run) -> str:
    speed = summarize(run).tokens_per_second
    return NOT_RECORDED if speed is None else f"{format_count(speed)} (median)"


def _elapsed(run: Run) -> str:
    times = [value for line in run.metrics.lines if (value := number(line, "time")) is not None]
    return format_duration(max(times) - min(times)) if len(times) > 1 else NOT_RECORDED


def _ranks(run: Run) -> str:
    world, ep = number(run.start, "world"), number(run.start, "ep")
    if world is None:
        return NOT_RECORDED
    return f"{plural(int(world), 'rank')}, expert-parallel size {format_number(ep)}"


def _count_events(*events: str) -> Callable[[Run], str]:
    """Return a counter of events; void lines count too, because the events did happen."""

    def count(run: Run) -> str:
        lines = (*run.metrics.lines, *run.metrics.void)
        return f"{sum(line['event'] in events for line in lines):,}"

    return count


KEY_NUMBERS: dict[str, Callable[[Run], str]] = {
    "State": _state,
    "Validation": _validation,
    "Training loss": lambda run: format_number(last_number(run.train, "loss")),
    "Tokens": lambda run: format_count(last_number(run.train, "tokens")),
    "Tokens per second": _speed,
    "Share of the step time for data": lambda run: format_percent(data_share(run.train)),
    "Time from first to last line": _elapsed,
    "Parameters": lambda run: format_count(number(run.start, "parameters")),
    "Active parameters per token": lambda run: format_count(number(run.start, "active_parameters")),
    "Trainable parameters": lambda run: format_count(number(run.start, "trainable_parameters")),
    "Forward FLOPs per token": lambda run: format_count(number(run.start, "flops_per_token")),
    "Ranks": _ranks,
    "Precision": lambda run: str(run.start.get("precision", NOT_RECORDED)),
    "Drop rate, last step": lambda run: format_percent(last_number(run.train, "drop_rate")),
    "Largest load over mean, last step": lambda run: format_number(
        last_number(run.train, "load_max_over_mean"), 3
    ),
    "Model FLOPs utilization, last step": lambda run: format_percent(last_number(run.train, "mfu")),
    "Memory, last step": lambda run: format_bytes(last_number(run.train, "memory")),
    "Restarts": _count_events("restart", "rollback"),
    "Alerts": lambda run: f"{count_alerts(run):,}",
    "Checkpoints": _count_events("checkpoint"),
    "Command": lambda run: str(run.start.get("command", NOT_RECORDED)),
    "Commit": lambda run: describe_commit(run) or NOT_RECORDED,
    "Machine": lambda run: str(run.start.get("machine", NOT_RECORDED)),
}


def events_panel(runs: Sequence[Run]) -> Panel:
    """Build the table of events of each run, void ones included, and remarks on lost lines."""
    tables, sentences = [], []
    for run in runs:
        events = [(line, False) for line in run.metrics.lines]
        events += [(line, True) for line in run.metrics.void]
        events = [pair for pair in events if pair[0]["event"] != "train"]
        events.sort(key=lambda pair: finite(pair[0].get("time")) or 0.0)
        if len(events) > MAX_EVENTS:
            often = ("checkpoint", "eval")
            rare = [pair for pair in events if pair[0]["event"] not in often][-MAX_EVENTS:]
            sentences.append(
                f"{run.name}: the last {len(rare)} of {len(events):,} events are shown, without "
                "checkpoints and evaluations."
            )
            events = rare
        if events:
            head = ["Event", "Step", "Details", "Time (UTC)"]
            rows = [_event_row(*pair) for pair in events]
            tables.append(Table(f"Events of {run.name}", head, rows))
        sentences += [*lost_lines(run, run.name), *unused_lines(run)]
    if not tables and not sentences:
        sentences = ["No event was recorded."]
    return Panel("events", "Events", sentences, tables=tables)


def event_marks(run: Run) -> list[dict[str, Any]]:
    """Return {kind, step, text} per event in the curves, the last ones of each kind."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for line in run.metrics.lines:
        kind = _event_kind(line)
        if kind in MARKED:
            text = _event_details(line)[:MAX_MARK_TEXT]
            mark = {"kind": kind, "step": line["step"], "text": text}
            by_kind.setdefault(kind, []).append(mark)
    return [mark for marks in by_kind.values() for mark in marks[-MAX_MARKS:]]


def _event_kind(line: Line) -> str:
    """Return the event's name; an alert line is a `skip`, an `alert` or a `note`."""
    if line["event"] == "eval":
        return "evaluation"
    if line["event"] != "alert":
        return str(line["event"])
    text = line.get("text")
    if isinstance(text, str) and "skipped" in text:
        return "skip"
    return "alert" if "title" in line else "note"


def _event_details(line: Line) -> str:
    """Return the text of the line, then its other plain values."""
    parts = [line["text"]] if isinstance(line.get("text"), str) else []
    if line["event"] == "restart" and line.get("resumed_from", line["step"]) == 0:
        parts.append("from the beginning, since there was no checkpoint")
    for name, value in line.items():
        # A fresh run is resumed from nothing, and is no attempt after another one.
        fresh = name in ("resumed_from", "attempt") and value == 0
        if name in EVENT_FIELDS or isinstance(value, dict | list) or fresh or value is None:
            continue
        amount = finite(value)
        formatted = str(value) if amount is None else format_number(amount)
        if name in ("seconds", "held") and amount is not None:
            formatted = format_duration(amount)
        parts.append(f"{EVENT_NAMES.get(name, name.replace('_', ' '))} {formatted}")
    text = "; ".join(parts)
    return text if len(text) <= MAX_DETAILS else text[:MAX_DETAILS] + " ..."


def _event_row(line: Line, is_void: bool) -> list[str]:
    details = [_event_details(line), "void after a later restart" if is_void else ""]
    text = "; ".join(part for part in details if part)
    return [_event_kind(line), f"{line['step']:,}", text, format_utc(finite(line.get("time")))]


def samples_panel(runs: Sequence[Run]) -> Panel:
    """Build the text samples, newest first. Old versions printed them to the terminal only."""
    texts = []
    for run in runs:
        samples = [(line["step"], line.get("sample")) for line in run.metrics.lines]
        written = [(step, text) for step, text in samples if isinstance(text, str) and text]
        for step, text in reversed(written[-MAX_SAMPLES:]):
            title = f"After step {step:,}"
            if len(runs) > 1:
                title = f"{run.name}, after step {step:,}"
            texts.append(TextBlock(title, text[:MAX_SAMPLE_TEXT]))
    absent = [] if texts else ["No sample was recorded."]
    return Panel("samples", "Text samples", absent, texts=texts)
