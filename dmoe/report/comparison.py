"""Several runs as tables of plain text: the settings that differ, quality beside cost, seeds.

Below are remarks on fairness.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from dmoe.report.format import format_count, format_flops, format_number, single_line, text_table
from dmoe.report.lost import problems
from dmoe.report.results import ABSENT
from dmoe.report.run import (
    Run,
    RunSummary,
    describe_end,
    differing_settings,
    is_finished,
    summarize,
)

Column = tuple[str, Callable[[RunSummary], float | None], Callable[[float], str]]
"""Title, where `{unit}` is `token` or `sample`; value; its format."""
COLUMNS: tuple[Column, ...] = (
    ("validation\nbits/byte", lambda run: run.bits_per_byte, "{:.4f}".format),
    ("validation\naccuracy", lambda run: run.accuracy, "{:.2%}".format),
    ("params\nin total", lambda run: run.parameters, format_count),
    ("active\nper {unit}", lambda run: run.active_parameters, format_count),
    ("trained", lambda run: run.trainable_parameters, format_count),
    ("FLOPs\nper {unit}", lambda run: run.flops_per_token, format_flops),
    ("training\nFLOPs", lambda run: run.training_flops, format_flops),
    ("{unit}s", lambda run: run.tokens, format_count),
    (
        "seconds",
        lambda run: run.seconds,
        lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.1f}",
    ),
    ("{unit}s\nper second", lambda run: run.tokens_per_second, format_count),
    ("dropped", lambda run: run.drop_rate, "{:.1%}".format),
    ("load\nmax/mean", lambda run: run.load_max_over_mean, "{:.2f}".format),
)
SEED = "train.seed"
OVER_SEEDS = ("validation\nbits/byte", "validation\naccuracy", "dropped", "load\nmax/mean")
"""Columns whose mean and range over seeds are printed."""


def comparison_lines(runs: Sequence[Run], width: int) -> list[str]:
    """Return the tables, at most `width` wide, and the remarks. Unfinished runs have a star."""
    summaries = [summarize(run) for run in runs]
    parts = [_settings_table(runs, width), _result_table(runs, summaries, width)]
    parts.append(_seed_table(runs, summaries, width))
    parts.append(
        [
            line
            for remark in _remarks(runs, summaries)
            for line in textwrap.wrap(remark, width, subsequent_indent="  ")
        ]
    )
    return [line for part in parts if part for line in ("", *part)][1:]


def _starred(runs: Sequence[Run]) -> list[str]:
    return [single_line(run.name) + ("" if is_finished(run) else " *") for run in runs]


def _settings_table(runs: Sequence[Run], width: int) -> list[str]:
    """Return the fields that differ, a row per run; nothing if none does."""
    different = differing_settings(runs)
    if not different:
        return []
    head = ["run", *(name.replace(".", ".\n") for name, *_ in different)]
    values = [[single_line(value) for value in row[1:]] for row in different]
    return text_table(head, list(zip(_starred(runs), *values, strict=True)), width)


def _seed_table(runs: Sequence[Run], summaries: Sequence[RunSummary], width: int) -> list[str]:
    """Return mean and range of each group of runs that differ in the seed only."""
    different = differing_settings(runs)
    others = [row for row in different if row[0] != SEED]
    groups: dict[tuple[str, ...], list[RunSummary]] = {}
    for index, summary in enumerate(summaries):
        groups.setdefault(tuple(row[index + 1] for row in others), []).append(summary)
    if len(others) == len(different) or max(map(len, groups.values())) < 2:
        return []
    rows = [
        [", ".join(f"{row[0]}={value}" for row, value in zip(others, key, strict=True)) or "all"]
        for key in groups
    ]
    head = ["over seeds", "runs"]
    for row, members in zip(rows, groups.values(), strict=True):
        row.append(str(len(members)))
    for title, read, form in COLUMNS:
        if title not in OVER_SEEDS:
            continue
        known = [[v for s in members if (v := read(s)) is not None] for members in groups.values()]
        if not any(known):
            continue
        head.append(title.format(unit=summaries[0].unit))
        for row, values in zip(rows, known, strict=True):
            row.append(_mean_and_range(values, form))
    return text_table(head, rows, width)


def _mean_and_range(values: Sequence[float], form: Callable[[float], str]) -> str:
    if not values:
        return ABSENT
    mean = form(sum(values) / len(values))
    return f"{mean} ({form(min(values))} .. {form(max(values))})"


def _result_table(runs: Sequence[Run], summaries: Sequence[RunSummary], width: int) -> list[str]:
    """Return quality and cost, a row per run."""
    head = ["run"]
    columns = [_starred(runs)]
    units = {summary.unit for summary in summaries}
    # A target is what tokens and samples have in common: each is predicted once.
    unit = units.pop() if len(units) == 1 else "target"
    any_frozen = any(summary.partly_trained for summary in summaries)
    for title, read, form in COLUMNS:
        values = [read(summary) for summary in summaries]
        if all(value is None for value in values) or (title == "trained" and not any_frozen):
            continue
        head.append(title.format(unit=unit))
        columns.append([ABSENT if value is None else form(value) for value in values])
    head.append("ranks\n/ EP")
    columns.append([_ranks(summary) for summary in summaries])
    return text_table(head, list(zip(*columns, strict=True)), width)


def _ranks(summary: RunSummary) -> str:
    if summary.world is None:
        return ABSENT
    return f"{format_number(summary.world)}/{format_number(summary.ep)}"


def comparison_json(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the same as plain JSON with all digits; null if nothing was recorded.

    `settings` has, per field that differs, its value in each run.
    """
    summaries = [summarize(run) for run in runs]
    rows = [
        {
            "name": run.name,
            "path": str(run.path),
            "finished": is_finished(run),
            "state": describe_end(run),
            **asdict(summary),
        }
        for run, summary in zip(runs, summaries, strict=True)
    ]
    different = {name: values for name, *values in differing_settings(runs)}
    return {"runs": rows, "settings": different, "remarks": list(_remarks(runs, summaries))}


def _remarks(runs: Sequence[Run], summaries: Sequence[RunSummary]) -> Iterator[str]:
    """Yield a sentence per reason why two rows may not be comparable."""
    for run in runs:
        if not is_finished(run):
            yield unfinished_remark(run)
        yield from problems(run)
    names = [single_line(run.name) for run in runs]
    by_metric = _group(names, [_metric(summary) for summary in summaries])
    if len(by_metric) > 1:
        yield f"Different tasks have different metrics: {_list_groups(by_metric)}."
    fingerprints = [f"data {item.data[:12]}" if item.data else None for item in summaries]
    by_data = _group(names, fingerprints)
    if len(by_data) > 1:
        yield f"Trained and evaluated on different data: {_list_groups(by_data)}."
    sizes = [
        None if item.held_out is None else f"{item.held_out:,.0f} {item.unit}s"
        for item in summaries
    ]
    by_size = _group(names, sizes)
    if len(by_size) > 1 and len(by_data) == 1:
        unit = summaries[0].unit
        yield f"Evaluated on different numbers of validation {unit}s: {_list_groups(by_size)}."
    frozen = [
        name
        for name, item in zip(names, summaries, strict=True)
        if item.partly_trained and item.training_flops
    ]
    if frozen:
        yield (
            f"Training FLOPs are an upper bound for {', '.join(frozen)}: frozen weights need no "
            "gradient, but are counted as if they did."
        )


def unfinished_remark(run: Run) -> str:
    """Return the remark on a run that did not complete its steps."""
    return f"* {single_line(run.name)}: {describe_end(run)}."


def _metric(summary: RunSummary) -> str | None:
    if summary.bits_per_byte is not None:
        return "bits/byte"
    return "accuracy" if summary.accuracy is not None else None


def _group(names: Sequence[str], keys: Sequence[str | None]) -> dict[str, list[str]]:
    """Return names by key; names without a key are in no group."""
    groups: dict[str, list[str]] = {}
    for name, key in zip(names, keys, strict=True):
        if key is not None:
            groups.setdefault(key, []).append(name)
    return groups


def _list_groups(groups: dict[str, list[str]]) -> str:
    return "; ".join(f"{', '.join(members)} ({key})" for key, members in groups.items())
