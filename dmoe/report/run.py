"""One run as the report sees it: a name, what was configured, what was measured. Checkpoints are never opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.config.schema import Config
from dmoe.runs.metrics_log import Line, Metrics, read_metrics_tolerant


@dataclass(frozen=True)
class Record:
    """What a run has measured, in the order of its steps."""

    metrics: Metrics

    @cached_property
    def train(self) -> list[Line]:
        """One line a step, ascending: a run that was started again in the same directory repeats none."""
        return _one_a_step(self.metrics.of("train"))

    @cached_property
    def evals(self) -> list[Line]:
        return _one_a_step(self.metrics.of("eval"))

    @cached_property
    def start(self) -> Line:
        """What the processes of the run said when they started, the last one's word in force: parameters, world, precision."""
        starts = [line for line in self.metrics.lines if line["event"] in ("start", "restart")]
        return {key: value for line in starts for key, value in line.items()}

    @cached_property
    def end(self) -> Line | None:
        """The `end` line, unless the run went on after it."""
        last = next(
            (line for line in reversed(self.metrics.lines) if line["event"] != "checkpoint"), None
        )
        return last if last is not None and last["event"] == "end" else None


@dataclass(frozen=True)
class Run(Record):
    name: str
    path: Path
    config: Config | None
    """None where resolved.yaml is missing or another version of dmoe wrote it; `config_problem` says which."""
    config_problem: str


def layers_of(line: Line) -> dict[int, dict[str, Any]]:
    """The MoE layers of one of a run's train or eval lines, by their number."""
    layers: dict[int, dict[str, Any]] = line["layers"]
    return layers


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs, under names that differ. Raises ConfigError for a path that is no run directory."""
    resolved = [_run_directory(path) for path in paths]
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
        problem = f"This version of dmoe cannot read the run's resolved.yaml, so its settings are left out: {error}."
    return Run(read_metrics_tolerant(path / "metrics.jsonl"), name, path, config, problem)


def _names(paths: list[Path]) -> list[str]:
    """The directory's name; with as many parents as tell the runs apart; the same run twice is numbered."""
    depth = 1
    while depth < 6 and len({_tail(path, depth) for path in paths}) < len(set(paths)):
        depth += 1
    names: list[str] = []
    for path in paths:
        name, again = _tail(path, depth), 2
        while name in names:
            name, again = f"{_tail(path, depth)} ({again})", again + 1
        names.append(name)
    return names


def _tail(path: Path, depth: int) -> str:
    return "/".join(path.parts[-depth:])


def _one_a_step(lines: list[Line]) -> list[Line]:
    """Ascending, each with its layers by number: found once here, since every curve asks for them."""
    by_step = {line["step"]: line for line in lines}
    return [{**by_step[step], "layers": _layers(by_step[step])} for step in sorted(by_step)]


def _layers(line: Line) -> dict[int, dict[str, Any]]:
    found = line.get("layers")
    rows = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    return {
        row["layer"] if isinstance(row.get("layer"), int) else index: row
        for index, row in enumerate(rows)
    }
