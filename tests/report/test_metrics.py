"""Lines of a metrics file that are in force."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dmoe.runs.metrics_log import finite, matrix, numbers, read_metrics_tolerant
from tests.report.runs import line


def written(path: Path, lines: list[dict[str, Any]], torn: str = "") -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in lines) + torn, encoding="utf-8")
    return path


def trained(*steps: int, **values: Any) -> list[dict[str, Any]]:
    return [line("train", step, **values) for step in steps]


def test_a_restart_voids_later_steps(tmp_path: Path) -> None:
    """Killed at step 7 and resumed after step 4: of steps 5 to 7 the second values count."""
    first, second = (
        [*trained(1, 2, 3, 4, 5, 6, 7, loss=1.0), line("alert", 6)],
        trained(5, 6, loss=2.0),
    )
    back = line("restart", 4, resumed_from=4)
    metrics = read_metrics_tolerant(
        written(tmp_path / "m", [line("start", 0), *first, back, *second])
    )
    assert [(item["step"], item["loss"]) for item in metrics.of("train")] == [
        (s, 1.0) for s in (1, 2, 3, 4)
    ] + [
        (5, 2.0),
        (6, 2.0),
    ]
    assert [item["step"] for item in metrics.void] == [5, 6, 7]
    # Alerts are not repeated, so they stay in force.
    assert [item["step"] for item in metrics.of("alert")] == [6]


def test_a_second_restart_may_go_further_back(tmp_path: Path) -> None:
    lines = [
        *trained(1, 2, 3, 4),
        line("restart", 3, resumed_from=3),
        *trained(4, 5),
        line("restart", 1, resumed_from=1),
        *trained(2),
    ]
    metrics = read_metrics_tolerant(written(tmp_path / "m", lines))
    assert [(item["event"], item["step"]) for item in metrics.lines] == [
        ("train", 1),
        ("restart", 3),
        ("restart", 1),
        ("train", 2),
    ]


def test_a_start_without_checkpoint_voids_step_0(tmp_path: Path) -> None:
    """Regression: the results compared with step 0 of an earlier process with another seed."""
    first, second = (
        [line("start", 0, resumed_from=0), line("eval", 0, loss=loss)] for loss in (1.0, 2.0)
    )
    metrics = read_metrics_tolerant(
        written(tmp_path / "m", [*first, *second, line("rollback", 0, resumed_from=0)])
    )
    assert [item["loss"] for item in metrics.of("eval")] == [2.0], (
        "a rollback measures nothing again"
    )
    assert [item["loss"] for item in metrics.void] == [1.0]


def test_a_restart_of_an_older_version_gives_its_step(tmp_path: Path) -> None:
    metrics = read_metrics_tolerant(
        written(tmp_path / "m", [*trained(1, 2, 3), line("restart", 2)])
    )
    assert [item["step"] for item in metrics.of("train")] == [1, 2]


@pytest.mark.parametrize(
    "torn",
    [
        '{"event": "train", "st',
        "\x00\x00\x00",
        "[1, 2]\n",
        '{"event": "train", "step": "3"}\n',
        "[" * 100_000,
    ],
)
def test_a_torn_or_foreign_line_is_counted_and_left_out(tmp_path: Path, torn: str) -> None:
    metrics = read_metrics_tolerant(written(tmp_path / "m", trained(1, 2), torn))
    assert [item["step"] for item in metrics.lines] == [1, 2]
    assert metrics.unreadable == 1


def test_no_file_and_an_empty_one_are_runs_without_lines(tmp_path: Path) -> None:
    assert read_metrics_tolerant(tmp_path / "none").lines == []
    assert read_metrics_tolerant(written(tmp_path / "m", [])).lines == []


def test_values_that_are_not_finite_numbers() -> None:
    assert [finite(value) for value in (1, 2.5, None, float("nan"), float("inf"), True, "3")] == [
        1,
        2.5,
        *[None] * 5,
    ]
    assert numbers([1, 2]) == [1, 2]
    assert numbers([1, None]) == numbers("12") == numbers(None) == []
    assert matrix([[1, 2], [3, 4]]) == [[1, 2], [3, 4]]
    assert matrix([[1, 2], [3]]) == matrix([[]]) == matrix([]) == matrix(None) == []
