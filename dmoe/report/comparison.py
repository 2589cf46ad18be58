"""Several runs as a table of plain text, a row a run: what each reached beside what it cost, and what makes them no fair comparison."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from dmoe.report.figures import RunSummary, describe_end, is_finished, summarize
from dmoe.report.format import format_count, format_flops, format_number, single_line, text_table
from dmoe.report.run import Run

ABSENT = "-"
Column = tuple[str, Callable[[RunSummary], float | None], Callable[[float], str]]
COLUMNS: tuple[Column, ...] = (
    ("held-out\nbits/byte", lambda run: run.bits_per_byte, "{:.4f}".format),
    ("held-out\naccuracy", lambda run: run.accuracy, "{:.2%}".format),
    ("params\nin all", lambda run: run.parameters, format_count),
    ("active\na {unit}", lambda run: run.active_parameters, format_count),
    ("trained", lambda run: run.trainable_parameters, format_count),
    ("FLOPs\na {unit}", lambda run: run.flops_per_token, format_flops),
    ("FLOPs to\ntrain", lambda run: run.training_flops, format_flops),
    ("{unit}s", lambda run: run.tokens, format_count),
    (
        "seconds",
        lambda run: run.seconds,
        lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.1f}",
    ),
    ("{unit}s\na second", lambda run: run.tokens_per_second, format_count),
    ("dropped", lambda run: run.drop_rate, "{:.1%}".format),
    ("load\nmax/mean", lambda run: run.load_max_over_mean, "{:.2f}".format),
)


def comparison_lines(runs: Sequence[Run], width: int) -> list[str]:
    """The table, at most `width` wide, and the remarks under it. A run that has not finished has a star."""
    figures = [summarize(run) for run in runs]
    head, columns = (
        ["run"],
        [[single_line(run.name) + " *" * (not is_finished(run)) for run in runs]],
    )
    units = {item.unit for item in figures}
    unit = (
        units.pop() if len(units) == 1 else "target"
    )  # what tokens and samples have in common: each is guessed once
    for title, read, spell in COLUMNS:
        values = [read(item) for item in figures]
        if title == "trained" and not any(item.partly_trained for item in figures):
            continue
        if any(value is not None for value in values):
            head.append(title.format(unit=unit))
            columns.append([ABSENT if value is None else spell(value) for value in values])
    head.append("ranks\n/ EP")
    columns.append(
        [
            f"{format_number(item.world)}/{format_number(item.ep)}"
            if item.world is not None
            else ABSENT
            for item in figures
        ]
    )
    lines = text_table(head, list(zip(*columns, strict=True)), width)
    said = [
        line
        for remark in _remarks(runs, figures)
        for line in textwrap.wrap(remark, width, subsequent_indent="  ")
    ]
    return lines + ([""] * bool(said)) + said


def comparison_json(runs: Sequence[Run]) -> dict[str, Any]:
    """The same with every digit; null where nothing was recorded."""
    figures = [summarize(run) for run in runs]
    rows = [
        {
            "name": run.name,
            "path": str(run.path),
            "finished": is_finished(run),
            "state": describe_end(run),
            **asdict(item),
        }
        for run, item in zip(runs, figures, strict=True)
    ]
    return {"runs": rows, "remarks": list(_remarks(runs, figures))}


def _remarks(runs: Sequence[Run], figures: Sequence[RunSummary]) -> Iterator[str]:
    """A sentence for each thing that a reader has to know before comparing two rows."""
    for run in runs:
        if not is_finished(run):
            yield unfinished(run)
    names = [single_line(run.name) for run in runs]
    by_measure = _groups(names, [_measure(item) for item in figures])
    if len(by_measure) > 1:
        yield f"Not one task, so not one measure: {_listed(by_measure)}."
    by_data = _groups(names, [f"data {item.data[:12]}" if item.data else None for item in figures])
    if len(by_data) > 1:
        yield f"Not trained and measured on the same data: {_listed(by_data)}."
    sizes = [
        None if item.held_out is None else f"{item.held_out:,.0f} {item.unit}s" for item in figures
    ]
    by_size = _groups(names, sizes)
    if len(by_size) > 1 and len(by_data) == 1:
        yield f"Not measured on equally many held-out {figures[0].unit}s: {_listed(by_size)}."
    frozen = [
        name
        for name, item in zip(names, figures, strict=True)
        if item.partly_trained and item.training_flops
    ]
    if frozen:
        yield f"FLOPs to train are an upper bound for {', '.join(frozen)}: frozen weights need no gradient, and are counted as if."


def unfinished(run: Run) -> str:
    return f"* {single_line(run.name)}: {describe_end(run)}."


def _measure(figures: RunSummary) -> str | None:
    return (
        "bits/byte"
        if figures.bits_per_byte is not None
        else "accuracy"
        if figures.accuracy is not None
        else None
    )


def _groups(names: Sequence[str], kinds: Sequence[str | None]) -> dict[str, list[str]]:
    """Names by kind; those of which it is not known are in no group."""
    found: dict[str, list[str]] = {}
    for name, kind in zip(names, kinds, strict=True):
        if kind is not None:
            found.setdefault(kind, []).append(name)
    return found


def _listed(groups: dict[str, list[str]]) -> str:
    return "; ".join(f"{', '.join(members)} ({kind})" for kind, members in groups.items())
