"""Restarts end after `limit` attempts from one step, or at once if a restart cannot help."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoe.config.errors import NoProgressError
from dmoe.runs.metrics_log import last_logged_step
from dmoe.runs.restarts import (
    earlier_fatal_error,
    record_attempt,
    record_fatal_error,
)

INVALID = [b"", b"{", b"[]", b"null", b"1e999", b"\xff", b'{"fatal_error": null}', b"[" * 100_000]
INVALID += [
    json.dumps(
        {"job": "a", "restart": 0, "resumed_step": 4, "count": count, "fatal_error": verdict}
    ).encode()
    for count, verdict in [
        ("3", None),
        (3, "no"),
        (3, {"code": "4", "text": "x"}),
        (3, {"code": 4}),
        (3, {"code": True, "text": "x"}),
    ]
]


def count(run: Path) -> int:
    return int(json.loads((run / "attempts.json").read_bytes())["count"])


def test_the_fourth_attempt_from_one_step_is_refused(tmp_path: Path) -> None:
    for restart in range(3):
        record_attempt(tmp_path, "a", restart, resumed_step=40, last_step=57, limit=3)
    with pytest.raises(NoProgressError) as refused:
        record_attempt(tmp_path, "a", 3, resumed_step=40, last_step=57, limit=3)
    assert refused.value.exit_code == 5
    assert str(refused.value).startswith(
        "3 attempts in a row ended without a checkpoint after step 40 "
        "(the last one reached step 57)"
    )
    assert "not starting again" in str(refused.value)


def test_a_checkpoint_between_two_failures_is_progress(tmp_path: Path) -> None:
    for restart, step in enumerate([0, 0, 0, 10, 10, 10, 20]):
        record_attempt(tmp_path, "a", restart, resumed_step=step, last_step=step, limit=3)
    assert count(tmp_path) == 1


def test_a_manual_start_and_another_job_reset_the_count(tmp_path: Path) -> None:
    for restart in range(3):
        record_attempt(tmp_path, "a", restart, resumed_step=0, last_step=0, limit=3)
    record_attempt(tmp_path, "b", 3, resumed_step=0, last_step=0, limit=3)
    assert count(tmp_path) == 1
    record_attempt(tmp_path, "b", 4, resumed_step=0, last_step=0, limit=3)
    record_attempt(tmp_path, "b", 0, resumed_step=0, last_step=0, limit=3)
    assert count(tmp_path) == 1


def test_jobs_without_a_name_are_counted_too(tmp_path: Path) -> None:
    """torchrun's static rendezvous names no job."""
    record_attempt(tmp_path, None, 0, resumed_step=0, last_step=0, limit=1)
    with pytest.raises(NoProgressError, match="the last one logged no step"):
        record_attempt(tmp_path, None, 1, resumed_step=0, last_step=0, limit=1)


def test_a_fatal_error_ends_the_restarts_of_this_job_only(tmp_path: Path) -> None:
    record_attempt(tmp_path, "a", 0, resumed_step=8, last_step=9, limit=3)
    record_fatal_error(tmp_path, "a", 4, "10 steps in a row were not finite")
    assert earlier_fatal_error(tmp_path, "a", 1) == (4, "10 steps in a row were not finite")
    assert earlier_fatal_error(tmp_path, "a", 2) == (4, "10 steps in a row were not finite")
    assert earlier_fatal_error(tmp_path, "a", 0) is None
    assert earlier_fatal_error(tmp_path, "b", 1) is None
    assert earlier_fatal_error(tmp_path, None, 1) is None
    record_attempt(tmp_path, "a", 0, resumed_step=8, last_step=9, limit=3)
    assert earlier_fatal_error(tmp_path, "a", 1) is None


def test_a_fatal_error_does_not_change_the_count(tmp_path: Path) -> None:
    record_fatal_error(tmp_path, "a", 4, "first")
    assert earlier_fatal_error(tmp_path, "a", 1) == (4, "first")
    for restart in range(3):
        record_attempt(tmp_path, "b", restart, resumed_step=0, last_step=0, limit=3)
    record_fatal_error(tmp_path, "b", 4, "second")
    assert count(tmp_path) == 3


@pytest.mark.parametrize("content", INVALID)
def test_an_invalid_file_counts_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "attempts.json").write_bytes(content)
    assert earlier_fatal_error(tmp_path, "a", 1) is None
    record_attempt(tmp_path, "a", 1, resumed_step=4, last_step=4, limit=3)
    assert count(tmp_path) == 1


def test_nothing_else_is_left_in_the_directory(tmp_path: Path) -> None:
    record_attempt(tmp_path, "a", 0, resumed_step=0, last_step=0, limit=3)
    record_fatal_error(tmp_path, "a", 4, "text")
    assert [path.name for path in tmp_path.iterdir()] == ["attempts.json"]


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_attempt(tmp_path, "a", 0, resumed_step=4, last_step=4, limit=3)

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="No space"):
            record_fatal_error(tmp_path, "a", 4, "text")
    assert earlier_fatal_error(tmp_path, "a", 1) is None
    record_attempt(tmp_path, "a", 1, resumed_step=4, last_step=4, limit=3)
    assert count(tmp_path) == 2


def test_the_last_logged_step_is_that_of_the_last_whole_line(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert last_logged_step(metrics) == 0
    metrics.write_bytes(b"")
    assert last_logged_step(metrics) == 0
    lines = [
        json.dumps({"event": "train", "step": step, "loss": 1.5}) + "\n" for step in range(1, 9)
    ]
    metrics.write_text("".join(lines), encoding="utf-8")
    assert last_logged_step(metrics) == 8
    metrics.write_text("".join(lines)[:-20], encoding="utf-8")
    assert last_logged_step(metrics) == 7


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    with metrics.open("wb") as file:
        file.truncate(64 << 20)
        file.seek(0, 2)
        file.write(b'\n{"event": "train", "step": 123}\n')
    tracemalloc.start()
    try:
        assert last_logged_step(metrics) == 123
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@given(content=st.binary(max_size=200))
def test_any_bytes_are_a_log_without_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    metrics = tmp_path_factory.getbasetemp() / "any.jsonl"
    metrics.write_bytes(content + b'\n{"step": 5}\n' + content.replace(b"\n", b" "))
    assert last_logged_step(metrics) >= 0
