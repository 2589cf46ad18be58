"""What of a metrics file is in force."""

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


def test_a_restart_undoes_what_lies_behind_it(tmp_path: Path) -> None:
    """The run was killed at step 7 and went on from step 4: steps 5 to 7 were measured twice, and only the second time counts."""
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
    assert [item["step"] for item in metrics.of("alert")] == [
        6
    ]  # it was said, and is not said again


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


def test_what_starts_from_nothing_measures_step_0_anew(tmp_path: Path) -> None:
    """The result table compared the end of a run with step 0 of another: killed before its first checkpoint, with another seed."""
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


def test_a_restart_of_an_older_version_says_it_by_its_step(tmp_path: Path) -> None:
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


def test_what_cannot_be_drawn_is_no_number() -> None:
    assert [finite(value) for value in (1, 2.5, None, float("nan"), float("inf"), True, "3")] == [
        1,
        2.5,
        *[None] * 5,
    ]
    assert numbers([1, 2]) == [1, 2]
    assert numbers([1, None]) == numbers("12") == numbers(None) == []
    assert matrix([[1, 2], [3, 4]]) == [[1, 2], [3, 4]]
    assert matrix([[1, 2], [3]]) == matrix([[]]) == matrix([]) == matrix(None) == []
