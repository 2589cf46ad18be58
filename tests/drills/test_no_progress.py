"""Drill 6: a fault at the same step every time ends the job after three attempts, exit code 5."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.drills.conftest import Reference
from tests.drills.jobs import events, processes_of, trace

pytestmark = pytest.mark.drills

NO_PROGRESS = 5


def test_the_same_fault_at_the_same_step(tmp_path: Path, two_ranks: Reference) -> None:
    """Attempt 0 saves step 5; attempts 1, 2, 3 resume it and die in step 7; 4 must not train."""
    run = tmp_path / "run"
    outcome = two_ranks.repeat(run, "kill@step rank=1 step=7 restarts=any", restarts=4)
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
    messages = [
        line
        for line in outcome.errors.splitlines()
        if line.startswith("dmoe: ") and "not starting again" in line
    ]
    assert messages, outcome.errors[-3000:]
    assert all(
        "3 attempts in a row" in line and "after step 5" in line and "reached step 6" in line
        for line in messages
    ), messages
    codes = [int(code) for code in re.findall(r"exitcode *: (-?\d+)", outcome.errors)]
    assert codes, "torchrun does not say how the last attempt ended"
    assert codes[-1] == NO_PROGRESS
    assert "Traceback" not in "".join(messages)
    assert processes_of(run) == []
