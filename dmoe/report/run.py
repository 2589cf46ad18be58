"""A run as the report reads it: name, config, metrics, and a summary of cost and quality.

Only `resolved.yaml` and `metrics.jsonl` are read, never a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.config.schema import Config
from dmoe.runs.metrics_log import Line, Metrics, number, read_metrics_tolerant

FORWARD_AND_BACKWARD = 3
"""FLOPs of training per FLOP of forward: backward takes twice as many (Kaplan et al. 2020, section
2.1). An upper bound if part of the model is frozen, because frozen weights need no gradient."""
QUALITY_METRICS = ("bits_per_byte", "accuracy")
"""What an evaluation is judged by besides the loss, depending on the task."""
MAX_NAME_PARTS = 6
MAX_LAYER_LINES = 2_000
"""Logged steps whose numbers per layer are read: 0.3 GB for 16 layers of 64 experts."""


@dataclass(frozen=True)
class Record:
    """Metrics of a run in the order of its steps."""

    metrics: Metrics

    @cached_property
    def train(self) -> list[Line]:
        """Train lines by ascending step, one per step even if the run was resumed."""
        return _one_line_per_step(self.metrics.of("train"))

    @cached_property
    def evals(self) -> list[Line]:
        """Evaluation lines by ascending step, one per step."""
        return _one_line_per_step(self.metrics.of("eval"))

    @cached_property
    def start(self) -> Line:
        """The `start` and `restart` lines merged, later values win: sizes, world, precision."""
        starts = [line for line in self.metrics.lines if line["event"] in ("start", "restart")]
        return {key: value for line in starts for key, value in line.items()}

    @cached_property
    def end(self) -> Line | None:
        """The `end` line; None if the run has not ended or was continued after it."""
        others = (line for line in reversed(self.metrics.lines) if line["event"] != "checkpoint")
        last = next(others, None)
        return last if last is not None and last["event"] == "end" else None


@dataclass(frozen=True)
class Run(Record):
    """A run directory that was read."""

    name: str
    path: Path
    config: Config | None
    """None if resolved.yaml is missing or not valid in this version; see `config_problem`."""
    config_problem: str


@dataclass(frozen=True)
class RunSummary:
    """Quality and cost of a run as plain numbers; None: not recorded, or not applicable."""

    step: int
    """Step of the last line."""
    bits_per_byte: float | None
    accuracy: float | None
    """On the held-out data at the last evaluation, like `loss` and `bits_per_byte`."""
    loss: float | None
    held_out: float | None
    """Tokens or samples that were evaluated."""
    parameters: float | None
    active_parameters: float | None
    trainable_parameters: float | None
    flops_per_token: float | None
    """FLOPs of forward per token, or per sample in classification."""
    training_flops: float | None
    tokens: float | None
    unit: str
    """`token` or `sample`."""
    seconds: float | None
    """Sum over processes from start to last measurement: void steps count, pauses do not."""
    tokens_per_second: float | None
    """Median of the logged steps."""
    drop_rate: float | None
    """At the last logged step, like `load_max_over_mean`; None without MoE layers."""
    load_max_over_mean: float | None
    world: float | None
    ep: float | None
    data: str | None
    """Fingerprint of the dataset."""

    @property
    def partly_trained(self) -> bool:
        """True if part of the model is frozen."""
        known = None not in (self.trainable_parameters, self.parameters)
        return known and self.trainable_parameters != self.parameters


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run directories, under distinct names; one that is given twice is read once.

    Raises:
        ConfigError: a path is not a run directory.
    """
    # runs/* holds runs/latest too, which is one of the others
    resolved = list(dict.fromkeys(_run_directory(path) for path in paths))
    return [_load(path, name) for path, name in zip(resolved, _names(resolved), strict=True)]


def _run_directory(path: Path) -> Path:
    if not (path / "resolved.yaml").is_file() and not (path / "metrics.jsonl").is_file():
        problem = "is not a run directory (it has neither resolved.yaml nor metrics.jsonl)"
        raise ConfigError("RUN", path, problem, "give one, e.g. runs/latest")
    return path.resolve()


def _load(path: Path, name: str) -> Run:
    config, problem = None, ""
    try:
        config = load(path / "resolved.yaml")
    except ConfigError as error:
        problem = (
            "This version of dmoe cannot read the run's resolved.yaml, so its settings are left "
            f"out: {error}."
        )
    return Run(
        read_metrics_tolerant(path / "metrics.jsonl", MAX_LAYER_LINES), name, path, config, problem
    )


def _names(paths: list[Path]) -> list[str]:
    """Return directory names, with as many parents as needed to tell them apart."""
    parts = 1
    while parts < MAX_NAME_PARTS and len({_tail(path, parts) for path in paths}) < len(paths):
        parts += 1
    return [_tail(path, parts) for path in paths]


def _tail(path: Path, parts: int) -> str:
    return "/".join(path.parts[-parts:])


def differing_settings(runs: Sequence[Run]) -> list[list[str]]:
    """Return a row per config field whose values differ, without `train.run_dir`."""
    configs = [dict(_leaves(asdict(run.config), "")) if run.config else {} for run in runs]
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
        if isinstance(value, dict):
            found += _leaves(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", str(value)))
    return found


def _one_line_per_step(lines: list[Line]) -> list[Line]:
    """Return the last line per step, ascending, with `layers` as a dict by layer number."""
    by_step = {line["step"]: line for line in lines}
    return [{**by_step[step], "layers": _parse_layers(by_step[step])} for step in sorted(by_step)]


def _parse_layers(line: Line) -> dict[int, dict[str, Any]]:
    found = line.get("layers")
    rows = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    return {
        row["layer"] if isinstance(row.get("layer"), int) else index: row
        for index, row in enumerate(rows)
    }


def layers_of(line: Line) -> dict[int, dict[str, Any]]:
    """Return the MoE layers of a line of `Record.train` or `Record.evals`, by layer number."""
    layers: dict[int, dict[str, Any]] = line["layers"]
    return layers


def as_dict(value: Any) -> dict[str, Any]:
    """Return `value` if it is a dict, else {}."""
    return value if isinstance(value, dict) else {}


def last_number(lines: Sequence[Line], *path: str) -> float | None:
    """Return the last number at `path`, or None."""
    values = (number(line, *path) for line in reversed(lines))
    return next((value for value in values if value is not None), None)


def latest_by_layer(lines: Sequence[Line], key: str) -> dict[int, Any]:
    """Return the values of `key` by layer, from the last line that has any."""
    for line in reversed(lines):
        rows = sorted(layers_of(line).items())
        found = {layer: row[key] for layer, row in rows if row.get(key) is not None}
        if found:
            return found
    return {}


def metric_name(line: Line) -> str:
    """Return the metric of an evaluation or of one of its domains; `loss` if it has no other."""
    return next((name for name in QUALITY_METRICS if name in line), "loss")


def summarize(record: Record) -> RunSummary:
    """Compute the summary of a run from its metrics."""
    start, held_out = record.start, record.evals[-1] if record.evals else {}
    routed = record.train[-1] if record.train and layers_of(record.train[-1]) else {}
    forward, tokens = number(start, "flops_per_token"), last_number(record.train, "tokens")
    training_flops = None
    if forward is not None and tokens is not None:
        training_flops = FORWARD_AND_BACKWARD * forward * tokens
    speeds = [number(line, "tokens_per_second") for line in record.train]
    known_speeds = [speed for speed in speeds if speed is not None]
    return RunSummary(
        step=_last_step(record),
        bits_per_byte=number(held_out, "bits_per_byte"),
        accuracy=number(held_out, "accuracy"),
        loss=number(held_out, "loss"),
        held_out=number(held_out, "tokens"),
        parameters=number(start, "parameters"),
        active_parameters=number(start, "active_parameters"),
        trainable_parameters=number(start, "trainable_parameters"),
        flops_per_token=forward,
        training_flops=training_flops,
        tokens=tokens,
        unit="sample" if start.get("task") == "classification" else "token",
        seconds=_training_seconds(record),
        tokens_per_second=median(known_speeds) if known_speeds else None,
        drop_rate=number(routed, "drop_rate"),
        load_max_over_mean=number(routed, "load_max_over_mean"),
        world=number(start, "world"),
        ep=number(start, "ep"),
        data=start["data"] if isinstance(start.get("data"), str) else None,
    )


def _last_step(record: Record) -> int:
    return record.metrics.lines[-1]["step"] if record.metrics.lines else 0


def _training_seconds(record: Record) -> float | None:
    """Sum the time of all processes of the run; None if none has measured anything."""
    timed = [
        (time, line["event"])
        for line in (*record.metrics.lines, *record.metrics.void)
        if (time := number(line, "time")) is not None
    ]
    started: float | None = None
    seconds: list[float] = []
    for time, event in sorted(timed, key=lambda pair: pair[0]):
        if event in ("start", "restart"):
            started = time
            seconds.append(0.0)
        elif event in ("train", "eval") and started is not None:
            seconds[-1] = time - started
    return sum(seconds) or None


def is_finished(record: Record) -> bool:
    """Return whether the run completed all of its steps."""
    return record.end is not None and not record.end.get("failed") and not record.end.get("stopped")


def describe_end(record: Record) -> str:
    """Describe how the run ended."""
    step = _last_step(record)
    if record.end is None:
        return f"no end was recorded; the last line is of step {step:,}: still running, or killed"
    if record.end.get("failed"):
        return f"ended by an error after step {step:,}"
    if record.end.get("stopped"):
        return f"stopped after step {step:,}, and can be resumed"
    return f"finished after step {step:,}"
