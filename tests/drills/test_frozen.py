"""Drills 12 and 13: a rank that stands still, and a rank that leaves a collective out. All ranks end in time and say whose fault it is.

Times are taken from the moment the rank was seen to stand still. What is promised is the time-out and one second; the tests allow four
seconds more, for a machine that others use.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.drills.jobs import Outcome, finish, footprint, job, losses, start, state_of, until

pytestmark = pytest.mark.drills

TIMEOUT, SLACK = 3.0, 1.0 + 4.0
SHORT = (f"parallel.timeout={TIMEOUT}", "checkpoint.every=4")


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_is_named_by_the_others_within_the_timeout(
    frozen: int, tmp_path: Path
) -> None:
    """Rank 0 speaks for all where all have found the same mistake; here it may be the one that cannot speak."""
    run, other = tmp_path / "run", 1 - frozen
    with job(run, *SHORT, ranks=2, fault=f"stop@step rank={frozen} step=6") as started:
        until(lambda: len(started.workers()) == 2, started, what="two ranks")
        workers = started.workers()
        until(lambda: state_of(workers[frozen]) == "T", started, what="the pause in step 6")
        began = time.monotonic()
        line = next(
            (line for line in started.process.stderr or () if line.startswith("dmoe: ")),
            "nobody said anything",
        )
        seconds = time.monotonic() - began
        os.kill(
            workers[frozen], signal.SIGKILL
        )  # torch's launcher asks it to leave and waits 30 s for an answer
        outcome = finish(started)
    print(
        f"{seconds:.2f} s after rank {frozen} stopped, with a time-out of {TIMEOUT:.0f} s: {line}"
    )
    assert outcome.code != 0
    assert line.startswith(f"dmoe: rank {other} lost rank {frozen} in step 6 ")
    assert seconds < TIMEOUT + SLACK
    assert footprint(run)["step"] == 4


def said(outcome: Outcome) -> list[str]:
    """What the ranks themselves had to say, without the launcher's report."""
    lines = [line for line in outcome.errors.splitlines() if line.startswith("dmoe: ")]
    assert lines, outcome.errors[-3000:]
    print(*lines, sep="\n")
    return lines


def test_a_rank_that_leaves_an_exchange_out_fails_all_ranks_in_time(tmp_path: Path) -> None:
    """Nothing watches, so nobody can say what was left out; but no rank may take the step, or wait for half an hour.

    All exchanges of this layer are of one size, so the ranks' next ones fit each other, and rank 1 is ahead by one from there on.
    """
    run = tmp_path / "run"
    outcome = start(
        run, *SHORT, "moe.exchange=padded", ranks=2, fault="skip@exchange rank=1 step=6"
    )
    assert outcome.code != 0
    waits = [
        re.match(r"dmoe: rank (\d) lost .* in step 6 after (\d+) s", line) for line in said(outcome)
    ]
    assert {match[1] for match in waits if match} == {"0", "1"}, outcome.errors[-3000:]
    assert all(int(match[2]) < TIMEOUT + SLACK for match in waits if match)
    assert footprint(run)["step"] == 4


def test_exchanges_that_do_not_fit_each_other_fail_all_ranks_too(tmp_path: Path) -> None:
    """Packed, the ranks' next exchanges differ in size: gloo ends the process that is sent too much, and its peer hears of that."""
    run = tmp_path / "run"
    outcome = start(
        run, *SHORT, "moe.exchange=packed", ranks=2, fault="skip@exchange rank=1 step=6"
    )
    assert outcome.code != 0
    assert max(losses(run)) == 5
    assert footprint(run)["step"] == 4


def test_with_the_watch_on_the_rank_the_operation_and_the_step_are_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = start(
        run, *SHORT, "debug.collectives=true", ranks=2, fault="skip@exchange rank=1 step=6"
    )
    assert outcome.code != 0
    for line in said(outcome):
        assert re.search(
            r"rank 0 is at step 5, MoE layer 0, dispatch .*, rank 1 at step 5, MoE layer 0, combine",
            line,
        ), line
    assert footprint(run)["step"] == 4
