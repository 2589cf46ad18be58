"""The first screen: how the runs ended, their key numbers, what their configs mean, and in what they differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from dmoe.report.figures import ending, figures_of, last, measure_of
from dmoe.report.meaning import meaning
from dmoe.report.metrics import number
from dmoe.report.page import Panel, Table
from dmoe.report.run import Run
from dmoe.report.spelling import count, duration, many, percent, plain, size_of

__all__ = ["differences", "summary"]


def summary(runs: Sequence[Run]) -> Panel:
    rows = [[label, *(spell(run) for run in runs)] for label, spell in NUMBERS.items()]
    recorded = [row for row in rows if any(cell != plain(None) for cell in row[1:])]
    tables = [Table("Key numbers", ["", *(run.name for run in runs)], recorded)]
    different = differences(runs)
    if different:
        tables.append(Table("Settings that differ", ["Setting", *(run.name for run in runs)], different))
    lists = {_heading(run, len(runs)): meaning(run.config, run.start) for run in runs if run.config is not None}
    words = [f"{run.name}: {run.config_problem}" for run in runs if run.config is None]
    return Panel("summary", "Summary", words, lists=lists, tables=tables)


def _heading(run: Run, runs: int) -> str:
    return f"What the settings of {run.name} mean" if runs > 1 else "What the settings mean"


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """One row for each field in which the configs are not all alike; `train.run_dir` always differs and says nothing."""
    configs = [dict(_leaves(asdict(run.config), "")) if run.config is not None else {} for run in runs]
    names = list(dict.fromkeys(name for config in configs for name in config))
    rows = [[name, *(config.get(name, "unknown") for config in configs)] for name in names if name != "train.run_dir"]
    return [row for row in rows if len(set(row[1:])) > 1]


def _leaves(section: dict[str, Any], prefix: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, value in section.items():
        found += _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", str(value))]
    return found


def _state(run: Run) -> str:
    return ending(run) + ("; see Events" if run.end is not None and run.end.get("failed") else "")


def _held_out(run: Run) -> str:
    """The last measure of held-out data, and the best one where that was earlier."""
    name = measure_of(run.evals[-1]) if run.evals else "loss"
    found = [(value, line["step"]) for line in run.evals if (value := number(line, name)) is not None]
    if not found:
        return plain(None)
    say = MEASURES[name]
    best, step = max(found) if name == "accuracy" else min(found)
    return say(found[-1][0]) + (f" (best {say(best)} at step {step:,})" if best != found[-1][0] else "")


def _speed(run: Run) -> str:
    speed = figures_of(run).tokens_per_second
    return plain(None) if speed is None else f"{many(speed)} (median)"


def _wall(run: Run) -> str:
    times = [value for line in run.metrics.lines if (value := number(line, "time")) is not None]
    return duration(max(times) - min(times)) if len(times) > 1 else plain(None)


def _ranks(run: Run) -> str:
    world, ep = number(run.start, "world"), number(run.start, "ep")
    return plain(None) if world is None else f"{count(int(world), 'rank')}, expert-parallel degree {plain(ep)}"


def _happened(*events: str) -> Callable[[Run], str]:
    """How often; lines that a restart undid count, since it did happen."""

    def spell(run: Run) -> str:
        return f"{sum(line['event'] in events for line in (*run.metrics.lines, *run.metrics.undone)):,}"

    return spell


MEASURES: dict[str, Callable[[float], str]] = {
    "bits_per_byte": lambda bits: f"{bits:.4g} bits a byte",
    "accuracy": lambda share: f"{percent(share)} right",
    "loss": lambda nats: f"loss {nats:.4g}",
}
NUMBERS: dict[str, Callable[[Run], str]] = {
    "State": _state,
    "Held out": _held_out,
    "Training loss": lambda run: plain(last(run.train, "loss")),
    "Tokens seen": lambda run: many(last(run.train, "tokens")),
    "Tokens a second": _speed,
    "Time from first to last line": _wall,
    "Parameters": lambda run: many(number(run.start, "parameters")),
    "Active parameters a token": lambda run: many(number(run.start, "active_parameters")),
    "Trainable parameters": lambda run: many(number(run.start, "trainable_parameters")),
    "Forward FLOPs a token": lambda run: many(number(run.start, "flops_per_token")),
    "Ranks": _ranks,
    "Precision": lambda run: str(run.start.get("precision", plain(None))),
    "Dropped choices, last step": lambda run: percent(last(run.train, "drop_rate")),
    "Largest load over mean, last step": lambda run: plain(last(run.train, "load_max_over_mean"), 3),
    "Model FLOP utilisation, last step": lambda run: percent(last(run.train, "mfu")),
    "Memory, last step": lambda run: size_of(last(run.train, "memory")),
    "Restarts": _happened("restart", "rollback"),
    "Alerts": _happened("alert"),
    "Saves": _happened("checkpoint"),
}
