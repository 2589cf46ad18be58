"""Drill 11: two jobs on one run directory: the second is refused, the first continues."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from tests.drills.jobs import events, finish, job, losses, start, state_of, wait_until

pytestmark = pytest.mark.drills


def test_the_second_job_is_refused_and_the_first_continues(tmp_path: Path) -> None:
    """The first is stopped meanwhile so that it cannot end; it must not be considered dead."""
    run = tmp_path / "run"
    with job(run, "parallel.timeout=120", ranks=2, fault="stop@step rank=0 step=6") as first:
        wait_until(
            lambda: len(first.workers()) == 2 and state_of(first.workers()[0]) == "T",
            first,
            what="the pause in step 6",
        )
        owner = first.workers()[0]
        before = (run / "metrics.jsonl").read_bytes(), (run / "lock").read_bytes()
        # with another name: its end kills its own processes only
        second = start(tmp_path / "second", f"train.run_dir={run}", ranks=2)
        assert second.code != 0
        (line,) = [line for line in second.errors.splitlines() if line.startswith("dmoe: ")]
        assert f"train.run_dir={run}: another job is at work there" in line
        assert f"host {socket.gethostname()}, pid {owner}, started 20" in line
        assert before == ((run / "metrics.jsonl").read_bytes(), (run / "lock").read_bytes())
        os.kill(owner, signal.SIGCONT)
        outcome = finish(first)
    assert outcome.code == 0, outcome.errors[-3000:]
    assert sorted(losses(run)) == list(range(1, 13))
    assert len(events(run, "start")) == 1
    assert events(run, "restart") == []
