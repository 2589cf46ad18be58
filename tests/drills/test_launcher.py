"""Drill 10: SIGKILL of the launcher, which cannot be caught: its ranks go too, and the run directory is free for the next job."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.drills.conftest import Unbroken
from tests.drills.jobs import events, job, processes_of, state_of, until

pytestmark = pytest.mark.drills

RUN = ("train.steps=80", "checkpoint.every=10")
PROMISED = 2.0
"""Seconds until every rank is gone; on a machine that others use a test allows three times that."""


def test_the_ranks_die_with_a_killed_launcher_and_a_new_job_goes_on(
    tmp_path: Path, unbroken: Unbroken
) -> None:
    """Rank 0 stands in step 13 when it happens, so that the run cannot be over by itself. The dead job's lock still names its owner:
    that it is dead is all the next job needs to know."""
    reference, run = unbroken(*RUN, ranks=2), tmp_path / "run"
    with job(run, *RUN, ranks=2, fault="hold@step rank=0 step=13") as started:
        until(Path(f"{run}.held").exists, started, what="step 13")
        ranks = started.workers()
        assert len(ranks) == 2
        started.process.kill()
        killed = time.monotonic()
        until(lambda: not processes_of(run), what="the end of both ranks")
        seconds = time.monotonic() - killed
    print(f"gone {seconds:.2f} s after SIGKILL of the launcher; should be {PROMISED:.0f}")
    assert seconds < 3 * PROMISED
    owner = json.loads((run / "lock").read_bytes())
    assert owner["pid"] == ranks[0]
    assert state_of(ranks[0]) in ("", "Z")
    outcome = reference.again(run, fault="")
    assert outcome.code == 0, outcome.errors[-3000:]
    assert [line["resumed_from"] for line in events(run, "restart")] == [10]
    reference.equals(run)
    assert (run / "lock").read_bytes() == b"", "a run that ends by itself empties its lock"
