"""Drills 12 and 13: a stopped rank, and a rank that skips a collective: all ranks end in time.

The time starts when the stop of the rank is observed. The limit is `parallel.timeout` plus one
second; the tests allow four seconds more, for a busy machine.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.drills.jobs import (
    Outcome,
    checkpoint_hashes,
    finish,
    job,
    losses,
    start,
    state_of,
    wait_until,
)

pytestmark = pytest.mark.drills

TIMEOUT, SLACK = 3.0, 1.0 + 4.0
SHORT = (f"parallel.timeout={TIMEOUT}", "checkpoint.every=4")


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_stopped_rank_is_named_within_the_timeout(frozen: int, tmp_path: Path) -> None:
    """Rank 0 prints errors that all ranks find; here it may be the stopped one."""
    run, other = tmp_path / "run", 1 - frozen
    with job(run, *SHORT, ranks=2, fault=f"stop@step rank={frozen} step=6") as started:
        wait_until(lambda: len(started.workers()) == 2, started, what="two ranks")
        workers = started.workers()
        wait_until(lambda: state_of(workers[frozen]) == "T", started, what="the pause in step 6")
        began = time.monotonic()
        line = next(
            (line for line in started.process.stderr or () if line.startswith("dmoe: ")),
            "no message",
        )
        seconds = time.monotonic() - began
        # torch's launcher would wait 30 s for the stopped rank to end
        os.kill(workers[frozen], signal.SIGKILL)
        outcome = finish(started)
    print(f"{seconds:.2f} s after rank {frozen} stopped, with a timeout of {TIMEOUT:.0f} s: {line}")
    assert outcome.code != 0
    assert line.startswith(f"dmoe: rank {other} lost rank {frozen} in step 6 ")
    assert seconds < TIMEOUT + SLACK
    assert checkpoint_hashes(run)["step"] == 4


def error_lines(outcome: Outcome) -> list[str]:
    """Return the error messages of the ranks, without the launcher's report."""
    lines = [line for line in outcome.errors.splitlines() if line.startswith("dmoe: ")]
    assert lines, outcome.errors[-3000:]
    print(*lines, sep="\n")
    return lines


def test_a_skipped_exchange_fails_all_ranks_in_time(tmp_path: Path) -> None:
    """Without the checker the skipped operation is unknown, but no rank may apply the step or hang.

    All exchanges of this layer have one size, so rank 1 is one exchange ahead from there on.
    """
    run = tmp_path / "run"
    outcome = start(
        run, *SHORT, "moe.exchange=padded", ranks=2, fault="skip@exchange rank=1 step=6"
    )
    assert outcome.code != 0
    waits = [
        re.match(r"dmoe: rank (\d) lost .* in step 6 after (\d+) s", line)
        for line in error_lines(outcome)
    ]
    assert {match[1] for match in waits if match} == {"0", "1"}, outcome.errors[-3000:]
    assert all(int(match[2]) < TIMEOUT + SLACK for match in waits if match)
    assert checkpoint_hashes(run)["step"] == 4


def test_exchanges_of_different_sizes_fail_all_ranks(tmp_path: Path) -> None:
    """Packed exchanges differ in size: gloo ends the process that gets too much data."""
    run = tmp_path / "run"
    outcome = start(
        run, *SHORT, "moe.exchange=packed", ranks=2, fault="skip@exchange rank=1 step=6"
    )
    assert outcome.code != 0
    assert max(losses(run)) == 5
    assert checkpoint_hashes(run)["step"] == 4


def test_the_collective_checker_names_rank_operation_and_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = start(
        run, *SHORT, "debug.collectives=true", ranks=2, fault="skip@exchange rank=1 step=6"
    )
    assert outcome.code != 0
    for line in error_lines(outcome):
        assert re.search(
            r"rank 0 is at step 5, MoE layer 0, dispatch .*, "
            r"rank 1 at step 5, MoE layer 0, combine",
            line,
        ), line
    assert checkpoint_hashes(run)["step"] == 4
