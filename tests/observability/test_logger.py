"""What a run says when its disk is full or its report is slow: it ends as it would have, and says why something is lacking."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dmoe.observability import logger


def test_a_report_that_takes_too_long_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The run ends all the same, and says why there is none."""
    monkeypatch.setattr(logger, "REPORT_SECONDS", 0.05)
    monkeypatch.setattr(logger, "_write", lambda run, report: time.sleep(30))
    said: list[str] = []
    given: list[Path | None] = []

    told: list[str] = []
    speaker = SimpleNamespace(
        metrics=object(),
        run=SimpleNamespace(path=tmp_path),
        say=said.append,
        tell=lambda event, step, values: told.append(event),
        trackers=SimpleNamespace(finish=given.append),
    )
    began = time.monotonic()
    logger.RunLogger.write_report(speaker, 7)  # type: ignore[arg-type]
    assert time.monotonic() - began < 20
    assert "more than 0.05 seconds" in said[0]
    assert told == ["alert"]
    assert given == [None], "the trackers get no report that is half-written"


def test_a_full_disk_loses_lines_and_says_so_once(tmp_path: Path) -> None:
    """A note that could not be written raised, and hid the exit code and the verdict of the run it was about."""

    class Full:
        def write(self, event: str, step: int, values: dict[str, Any]) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            raise OSError(28, "No space left on device")

    said: list[str] = []
    speaker = logger.RunLogger.__new__(logger.RunLogger)
    speaker.metrics, speaker.lines_lost, speaker.run = (
        Full(),
        0,
        SimpleNamespace(metrics=tmp_path / "metrics.jsonl"),
    )  # type: ignore[assignment]
    speaker.display = SimpleNamespace(say=said.append, tell=lambda *told: None, close=lambda: None)  # type: ignore[assignment]
    speaker.trackers = SimpleNamespace(alert=lambda title, text: None, close=lambda: None)  # type: ignore[assignment]
    for step in (1, 2, 3):
        speaker.alert(step, "bad step", "a step was skipped")
    speaker.close()
    assert speaker.lines_lost == 3
    assert len(said) == 1
    assert "metrics.jsonl cannot be written (No space left on device)" in said[0]
