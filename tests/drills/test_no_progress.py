"""Drill 6: a fault that comes back at the same step every time. Three attempts, then an end with an exit code of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.drills.conftest import Reference
from tests.drills.jobs import events, processes_of, trace

pytestmark = pytest.mark.drills

NO_PROGRESS = 5


def test_the_same_fault_at_the_same_step(tmp_path: Path, two_ranks: Reference) -> None:
    """Attempt 0 gets as far as the checkpoint of step 5; 1, 2, 3 start from it and die in step 7; attempt 4 must not train."""
    run = tmp_path / "run"
    outcome = two_ranks.again(run, "kill@step rank=1 step=7 restarts=any", restarts=4)
    assert outcome.code != 0
    assert {line["restart"] for line in trace(run)} == {0, 1, 2, 3}, (
        "an attempt without progress trained again"
    )
    assert [line["attempt"] for line in events(run, "start") + events(run, "restart")] == [
        0,
        1,
        2,
        3,
    ]
    said = [
        line
        for line in outcome.errors.splitlines()
        if line.startswith("dmoe: ") and "not starting again" in line
    ]
    assert said, outcome.errors[-3000:]
    assert all(
        "3 attempts in a row" in line and "after step 5" in line and "reached step 6" in line
        for line in said
    ), said
    codes = [int(code) for code in re.findall(r"exitcode *: (-?\d+)", outcome.errors)]
    assert codes, "torchrun does not say how the last attempt ended"
    assert codes[-1] == NO_PROGRESS
    assert "Traceback" not in "".join(said)
    assert processes_of(run) == []
