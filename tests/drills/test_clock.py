"""Drill 28: the clock goes back one hour in the middle of a run; nothing depends on it.

Python's clock is set back in every rank; the kernel's cannot be set for one job. The times of the
checkpoint files, which are the kernel's, are set back by `os.utime`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dmoe.checkpoint import latest
from tests.drills.conftest import UninterruptedRuns
from tests.drills.jobs import events

pytestmark = pytest.mark.drills

HOUR = 3600.0


def test_a_clock_set_back_changes_only_recorded_times(
    tmp_path: Path, uninterrupted: UninterruptedRuns
) -> None:
    reference, run = uninterrupted(ranks=2), tmp_path / "run"
    outcome = reference.repeat(run, "back@step rank=any step=6; term@step rank=0 step=9")
    assert outcome.code != 0
    times = {line["step"]: line["time"] for line in events(run, "checkpoint")}
    assert times[8] < times[4] - 0.9 * HOUR, "the fault was not injected"
    for path in [found := run / "checkpoints" / "step-00000010", *found.iterdir()]:
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - HOUR))
    assert latest(run / "checkpoints") == found
    outcome = reference.repeat(run, "back@step rank=any step=11")
    assert outcome.code == 0, outcome.errors[-3000:]
    assert [line["resumed_from"] for line in events(run, "restart")] == [10]
    reference.assert_equals(run)
    for line in events(run, "train"):
        assert line["tokens_per_second"] > 0, line
    for line in events(run, "checkpoint"):
        assert 0 <= line["held"] <= line["seconds"] < HOUR / 2, line
