"""Logger with a full disk or a slow report: the run ends normally, and a note has the reason."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dmoe.observability import escape_controls, logger, run_with_timeout


def test_slow_report_is_abandoned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The run ends, and the note has the reason."""
    monkeypatch.setattr(logger, "REPORT_SECONDS", 0.05)
    monkeypatch.setattr(logger, "_build_report", lambda run, report: time.sleep(30))
    printed: list[str] = []
    reports: list[Path | None] = []

    events: list[str] = []
    run_logger = SimpleNamespace(
        metrics=object(),
        run=SimpleNamespace(path=tmp_path),
        print=printed.append,
        log_event=lambda event, step, values: events.append(event),
        trackers=SimpleNamespace(finish=reports.append),
    )
    began = time.monotonic()
    logger.RunLogger.write_report(run_logger, 7)  # type: ignore[arg-type]
    assert time.monotonic() - began < 20
    assert "more than 0.05 seconds" in printed[0]
    assert events == ["alert"]
    assert reports == [None], "the trackers get no incomplete report"


def test_full_disk_loses_lines_with_one_note(tmp_path: Path) -> None:
    """A note that could not be written raised, and hid the exit code and the error of the run."""

    class FullDisk:
        def write(self, event: str, step: int, values: dict[str, Any]) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            raise OSError(28, "No space left on device")

    printed: list[str] = []
    run_logger = logger.RunLogger.__new__(logger.RunLogger)
    run_logger.metrics, run_logger.lines_lost, run_logger.run = (
        FullDisk(),
        0,
        SimpleNamespace(metrics=tmp_path / "metrics.jsonl"),
    )  # type: ignore[assignment]
    run_logger.display = SimpleNamespace(
        print=printed.append, log_event=lambda *events: None, close=lambda: None
    )  # type: ignore[assignment]
    run_logger.trackers = SimpleNamespace(alert=lambda title, text: None, close=lambda: None)  # type: ignore[assignment]
    for step in (1, 2, 3):
        run_logger.alert(step, "bad step", "a step was skipped")
    run_logger.close()
    assert run_logger.lines_lost == 3
    assert len(printed) == 1
    assert "metrics.jsonl cannot be written (No space left on device)" in printed[0]


def test_call_with_timeout_returns_the_reason_of_a_failure() -> None:
    def fail() -> str | None:
        raise OSError("two\nlines")

    assert run_with_timeout(lambda: None, 10) is None
    assert run_with_timeout(lambda: "no server", 10) == "no server"
    assert run_with_timeout(fail, 10) == "two lines"
    assert run_with_timeout(lambda: time.sleep(30), 0.01, "too late") == "too late"


def test_control_characters_of_a_sample_do_not_reach_the_terminal() -> None:
    """An untrained model printed bytes that moved the cursor and rang the bell."""
    text = "a\x1b[2J\x07\x9b\r\nna\u00efve\t\u200dé日"
    assert escape_controls(text) == "a\\x1b[2J\\x07\\x9b\\r\nna\u00efve\t\u200dé日"
