"""What every training run has: loss and bits per byte or accuracy, gradients, time, bytes.

The first screen: how the runs ended, their key numbers, what their configs mean, and in what they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from dmoe.report.figures import (
    Reader,
    by_run,
    describe_end,
    last_number,
    metric_name,
    overlay,
    summarize,
)
from dmoe.report.format import (
    format_bytes,
    format_count,
    format_duration,
    format_number,
    format_percent,
    plural,
)
from dmoe.report.meaning import meaning
from dmoe.report.page import Chart, Panel, Table
from dmoe.report.results import domain_rows
from dmoe.report.run import Run
from dmoe.runs.metrics_log import Line, number

PIECES = ("data", "forward", "backward", "exchange", "optimizer", "other")


def at(*path: str) -> Reader:
    return partial(_at, path)


def _at(path: tuple[str, ...], line: Line) -> float | None:
    return number(line, *path)


def panel(
    id: str, title: str, charts: Sequence[Chart | None], absent: str, words: Sequence[str] = ()
) -> Panel:
    """A panel of what there is; `absent` is said where there is nothing."""
    found = [chart for chart in charts if chart is not None]
    return Panel(id, title, words if found else [absent], charts=found)


def quality(runs: Sequence[Run]) -> Panel:
    """Loss, and what people read beside it; a run has bits per byte or accuracy, by its task."""
    told = (
        "Points with markers are held-out data, the other line is the training batch of that step."
    )
    caption = f"Lower is better. {told}"
    found = panel(
        "quality",
        "Loss, bits per byte, accuracy",
        [
            overlay(
                "loss",
                "Loss",
                caption,
                "nats a target",
                runs,
                {"training": at("loss")},
                held_out=at("loss"),
            ),
            overlay(
                "bits-per-byte",
                "Bits per byte",
                caption + " Comparable between tokenizers.",
                "bits a byte",
                runs,
                {"training": at("bits_per_byte")},
                held_out=at("bits_per_byte"),
            ),
            overlay(
                "accuracy",
                "Accuracy",
                f"Share of the targets that were guessed right; higher is better. {told}",
                "share",
                runs,
                {"training": at("accuracy")},
                held_out=at("accuracy"),
            ),
        ],
        "No step of training and no evaluation was recorded.",
    )
    return replace(
        found, tables=[table for run in runs if (table := _by_domain(run, len(runs))) is not None]
    )


def _by_domain(run: Run, runs: int) -> Table | None:
    """Each domain at the first evaluation and at the last one; `=` where nothing has changed to the last bit."""
    head, rows = domain_rows(run.evals)
    title = "Held out, by domain" + (f", {run.name}" if runs > 1 else "")
    return Table(title, [name.replace("\n", " ") for name in head], rows) if len(rows) > 1 else None


def gradients(runs: Sequence[Run]) -> Panel:
    norms = {
        "all": at("grad_norm"),
        "dense": at("grad_norm_dense"),
        "experts": at("grad_norm_experts"),
        "router": at("grad_norm_router"),
    }
    return panel(
        "gradients",
        "Gradients and learning rate",
        [
            overlay(
                "grad-norm",
                "Gradient norm",
                "Before clipping; of all parameters and of each class.",
                "norm",
                runs,
                norms,
            ),
            overlay(
                "clip",
                "Clip factor",
                "What the gradient was multiplied by; 1 where it was short enough.",
                "factor",
                runs,
                {"": at("clip_factor")},
            ),
            overlay(
                "lr",
                "Learning rate",
                "As the schedule gave it for each step.",
                "rate",
                runs,
                {"": at("lr")},
            ),
        ],
        "No gradient norm was recorded.",
    )


def time(runs: Sequence[Run]) -> Panel:
    pieces = {piece: at("step_time", piece) for piece in PIECES}
    charts = [
        overlay(
            "speed",
            "Tokens a second",
            "Over all ranks, evaluations and saves left out.",
            "tokens/s",
            runs,
            {"": at("tokens_per_second")},
        ),
        by_run(
            "time-split",
            "Where a step's time goes",
            "Seconds of one step, stacked.",
            "s a step",
            runs,
            pieces,
            stack=True,
        ),
        overlay(
            "straggler",
            "Straggler factor",
            "The slowest rank's time over the mean; 1 means that none waits.",
            "factor",
            runs,
            {"": at("straggler")},
        ),
        overlay(
            "exchanged",
            "Bytes exchanged",
            "Sent between ranks in one step.",
            "bytes a step",
            runs,
            {"": at("bytes_exchanged")},
        ),
        overlay(
            "memory", "Memory", "The peak of the fullest rank.", "bytes", runs, {"": at("memory")}
        ),
        overlay(
            "mfu",
            "Model FLOP utilisation",
            "Share of the measured peak that useful arithmetic took.",
            "share",
            runs,
            {"": at("mfu")},
        ),
    ]
    split = (
        ""
        if any(chart and chart.id == "time-split" for chart in charts)
        else "The split of the step time was not recorded."
    )
    return panel(
        "time", "Time, bytes and memory", charts, "No speed was recorded.", [split] if split else []
    )


def summary(runs: Sequence[Run]) -> Panel:
    rows = [[label, *(spell(run) for run in runs)] for label, spell in NUMBERS.items()]
    recorded = [row for row in rows if any(cell != format_number(None) for cell in row[1:])]
    tables = [Table("Key numbers", ["", *(run.name for run in runs)], recorded)]
    different = differences(runs)
    if different:
        tables.append(
            Table("Settings that differ", ["Setting", *(run.name for run in runs)], different)
        )
    lists = {
        _heading(run, len(runs)): meaning(run.config, run.start)
        for run in runs
        if run.config is not None
    }
    words = [f"{run.name}: {run.config_problem}" for run in runs if run.config is None]
    return Panel("summary", "Summary", words, lists=lists, tables=tables)


def _heading(run: Run, runs: int) -> str:
    return f"What the settings of {run.name} mean" if runs > 1 else "What the settings mean"


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """One row for each field in which the configs are not all alike; `train.run_dir` always differs and says nothing."""
    configs = [
        dict(_leaves(asdict(run.config), "")) if run.config is not None else {} for run in runs
    ]
    names = list(dict.fromkeys(name for config in configs for name in config))
    rows = [
        [name, *(config.get(name, "unknown") for config in configs)]
        for name in names
        if name != "train.run_dir"
    ]
    return [row for row in rows if len(set(row[1:])) > 1]


def _leaves(section: dict[str, Any], prefix: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, value in section.items():
        found += (
            _leaves(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else [(f"{prefix}{name}", str(value))]
        )
    return found


def _state(run: Run) -> str:
    return describe_end(run) + (
        "; see Events" if run.end is not None and run.end.get("failed") else ""
    )


def _held_out(run: Run) -> str:
    """The last measure of held-out data, and the best one where that was earlier."""
    name = metric_name(run.evals[-1]) if run.evals else "loss"
    found = [
        (value, line["step"]) for line in run.evals if (value := number(line, name)) is not None
    ]
    if not found:
        return format_number(None)
    say = MEASURES[name]
    best, step = max(found) if name == "accuracy" else min(found)
    return say(found[-1][0]) + (
        f" (best {say(best)} at step {step:,})" if best != found[-1][0] else ""
    )


def _speed(run: Run) -> str:
    speed = summarize(run).tokens_per_second
    return format_number(None) if speed is None else f"{format_count(speed)} (median)"


def _wall(run: Run) -> str:
    times = [value for line in run.metrics.lines if (value := number(line, "time")) is not None]
    return format_duration(max(times) - min(times)) if len(times) > 1 else format_number(None)


def _ranks(run: Run) -> str:
    world, ep = number(run.start, "world"), number(run.start, "ep")
    return (
        format_number(None)
        if world is None
        else f"{plural(int(world), 'rank')}, expert-parallel degree {format_number(ep)}"
    )


def _happened(*events: str) -> Callable[[Run], str]:
    """How often; lines that a restart undid count, since it did happen."""

    def spell(run: Run) -> str:
        return (
            f"{sum(line['event'] in events for line in (*run.metrics.lines, *run.metrics.void)):,}"
        )

    return spell


MEASURES: dict[str, Callable[[float], str]] = {
    "bits_per_byte": lambda bits: f"{bits:.4g} bits a byte",
    "accuracy": lambda share: f"{format_percent(share)} right",
    "loss": lambda nats: f"loss {nats:.4g}",
}
NUMBERS: dict[str, Callable[[Run], str]] = {
    "State": _state,
    "Held out": _held_out,
    "Training loss": lambda run: format_number(last_number(run.train, "loss")),
    "Tokens seen": lambda run: format_count(last_number(run.train, "tokens")),
    "Tokens a second": _speed,
    "Time from first to last line": _wall,
    "Parameters": lambda run: format_count(number(run.start, "parameters")),
    "Active parameters a token": lambda run: format_count(number(run.start, "active_parameters")),
    "Trainable parameters": lambda run: format_count(number(run.start, "trainable_parameters")),
    "Forward FLOPs a token": lambda run: format_count(number(run.start, "flops_per_token")),
    "Ranks": _ranks,
    "Precision": lambda run: str(run.start.get("precision", format_number(None))),
    "Dropped choices, last step": lambda run: format_percent(last_number(run.train, "drop_rate")),
    "Largest load over mean, last step": lambda run: format_number(
        last_number(run.train, "load_max_over_mean"), 3
    ),
    "Model FLOP utilisation, last step": lambda run: format_percent(last_number(run.train, "mfu")),
    "Memory, last step": lambda run: format_bytes(last_number(run.train, "memory")),
    "Restarts": _happened("restart", "rollback"),
    "Alerts": _happened("alert"),
    "Saves": _happened("checkpoint"),
}
