"""Drill 33: five short jobs of four ranks, to find races at start and shutdown."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.drills.jobs import losses, processes_of, start

pytestmark = [pytest.mark.drills, pytest.mark.timeout(1200)]

RUNS = 5


def test_short_runs_all_end_well(tmp_path: Path) -> None:
    """Five of them: twenty, and eight, found no more. Ranks are new interpreters, with their end.

    Without a final barrier, a peer's closed socket could abort a finished rank (SIGABRT)."""
    codes, seen = [], []
    for number in range(RUNS):
        run = tmp_path / f"run-{number}"
        outcome = start(run, "train.steps=2", ranks=4, forked=False)
        codes.append(outcome.code)
        assert processes_of(run) == [], f"run {number} left a process behind"
        seen.append(losses(run))
    assert codes == [0] * RUNS
    assert all(sorted(found) == [1, 2] and found == seen[0] for found in seen)
