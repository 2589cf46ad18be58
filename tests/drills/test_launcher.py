"""Drill 10: SIGKILL of the launcher ends its ranks too; the next job resumes the run."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.drills.conftest import UninterruptedRuns
from tests.drills.jobs import events, job, processes_of, state_of, wait_until

pytestmark = pytest.mark.drills

RUN = ("train.steps=80", "checkpoint.every=10")
TARGET_SECONDS = 2.0
"""Time until every rank has ended; the test allows three times that on a busy machine."""


def test_ranks_end_with_a_killed_launcher_and_a_new_job_resumes(
    tmp_path: Path, uninterrupted: UninterruptedRuns
) -> None:
    """Rank 0 waits in step 13, so that the run cannot end by itself.

    The lock still names the dead owner; the next job checks that it is dead.
    """
    reference, run = uninterrupted(*RUN, ranks=2), tmp_path / "run"
    with job(run, *RUN, ranks=2, fault="hold@step rank=0 step=13") as started:
        wait_until(Path(f"{run}.held").exists, started, what="step 13")
        ranks = started.workers()
        assert len(ranks) == 2
        started.process.kill()
        killed = time.monotonic()
        wait_until(lambda: not processes_of(run), what="the end of both ranks")
        seconds = time.monotonic() - killed
    print(f"ended {seconds:.2f} s after SIGKILL of the launcher; target {TARGET_SECONDS:.0f}")
    assert seconds < 3 * TARGET_SECONDS
    owner = json.loads((run / "lock").read_bytes())
    assert owner["pid"] == ranks[0]
    assert state_of(ranks[0]) in ("", "Z")
    outcome = reference.repeat(run, fault="")
    assert outcome.code == 0, outcome.errors[-3000:]
    assert [line["resumed_from"] for line in events(run, "restart")] == [10]
    reference.assert_equals(run)
    assert (run / "lock").read_bytes() == b"", "a run that ends by itself empties its lock"
