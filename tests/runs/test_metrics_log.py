"""`metrics.jsonl` after kills and resumes: no gap, no duplicate, only complete lines."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dmoe.config.errors import ConfigError
from dmoe.runs.metrics_log import MetricsFile, read_metrics


def write(path: Path, *events: tuple[str, int, dict[str, object]]) -> None:
    file = MetricsFile(path)
    for event, step, values in events:
        file.write(event, step, values)
    file.close()


def steps(path: Path, event: str = "train") -> list[int]:
    return [line["step"] for line in read_metrics(path) if line["event"] == event]


def test_steps_beyond_the_checkpoint_are_void_after_a_resume(tmp_path: Path) -> None:
    """A run killed at step 5 and resumed after step 3 had steps 4 and 5 twice in every plot."""
    path = tmp_path / "metrics.jsonl"
    first = [("train", step, {"loss": -step}) for step in range(1, 6)]
    write(
        path,
        ("start", 0, {"resumed_from": 0}),
        *first,
        ("eval", 5, {}),
        ("checkpoint", 3, {}),
        ("alert", 5, {"text": "note"}),
    )
    write(
        path,
        ("restart", 3, {"resumed_from": 3}),
        *[("train", step, {"loss": step}) for step in range(4, 7)],
    )
    assert steps(path) == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in read_metrics(path) if line["event"] == "train"] == [
        -1,
        -2,
        -3,
        4,
        5,
        6,
    ]
    assert steps(path, "eval") == []
    assert steps(path, "checkpoint") == [3]
    assert steps(path, "alert") == [5], "alerts stay"
    assert (
        len([line for line in read_metrics(path, include_void=True) if line["event"] == "train"])
        == 8
    )


def test_second_resume_further_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, *[("train", step, {"loss": 1}) for step in range(1, 7)])
    write(
        path,
        ("restart", 4, {"resumed_from": 4}),
        *[("train", step, {"loss": 2}) for step in range(5, 8)],
    )
    write(
        path,
        ("restart", 2, {"resumed_from": 2}),
        *[("train", step, {"loss": 3}) for step in range(3, 9)],
    )
    assert [line["loss"] for line in read_metrics(path) if line["event"] == "train"] == [
        1,
        1,
        3,
        3,
        3,
        3,
        3,
        3,
    ]
    assert steps(path) == list(range(1, 9))


def test_new_start_voids_step_0(tmp_path: Path) -> None:
    """The evaluation at step 0 of a killed start with another seed stayed in force."""
    path = tmp_path / "metrics.jsonl"
    for loss in (1, 2):
        write(
            path, ("start", 0, {"resumed_from": 0}), ("eval", 0, {"loss": loss}), ("train", 1, {})
        )
    write(path, ("rollback", 0, {"resumed_from": 0}))
    assert [line["loss"] for line in read_metrics(path) if line["event"] == "eval"] == [2], (
        "a rollback does not void step 0"
    )
    assert steps(path) == []


@pytest.mark.parametrize(
    "torn",
    ['{"event": "train", "st', '{"event": "train", "step": 3}', "{", '{"x": "' + "y" * 200_000],
)
def test_incomplete_last_line_is_removed(torn: str, tmp_path: Path) -> None:
    """The next writer appended to the incomplete line, which made the file invalid."""
    path = tmp_path / "metrics.jsonl"
    write(path, ("train", 1, {}), ("train", 2, {}))
    with path.open("a", encoding="utf-8") as file:
        file.write(torn)
    assert steps(path) == [1, 2]
    write(path, ("restart", 2, {"resumed_from": 2}), ("train", 3, {}))
    assert steps(path) == [1, 2, 3]
    assert [json.loads(line)["event"] for line in path.read_text(encoding="utf-8").splitlines()][
        2:
    ] == ["restart", "train"]


def test_file_with_one_incomplete_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"eve', encoding="utf-8")
    assert read_metrics(path) == []
    write(path, ("train", 1, {}))
    assert steps(path) == [1]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"event": "train"}', '"text"'])
def test_invalid_line_is_refused_with_its_number(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        f'{{"event": "train", "step": 1}}\n{line}\n{{"event": "train", "step": 2}}\n',
        encoding="utf-8",
    )
    with pytest.raises(ConfigError, match="line 2"):
        read_metrics(path)


def test_no_secret_and_no_nan_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct-horse-battery")
    path = tmp_path / "metrics.jsonl"
    write(
        path,
        (
            "alert",
            1,
            {
                "text": "cannot open /x/correct-horse-battery",
                "norm": math.nan,
                "all": [math.inf, 1.5],
            },
        ),
    )
    assert "correct-horse" not in path.read_text(encoding="utf-8")
    assert read_metrics(path)[0]["norm"] is None
    assert read_metrics(path)[0]["all"] == [None, 1.5]
