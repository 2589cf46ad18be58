"""Drills 1, 2, 3 and 5: ranks killed in a step and around a checkpoint resume bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.drills.conftest import Reference, UninterruptedRuns
from tests.drills.jobs import events, finish, job, processes_of, wait_until

pytestmark = pytest.mark.drills


def resumed(run: Path) -> list[int]:
    """Return the step that each restart resumed from."""
    return [line["resumed_from"] for line in events(run, "restart")]


def test_a_rank_of_four_is_killed_inside_a_step(
    tmp_path: Path, uninterrupted: UninterruptedRuns
) -> None:
    """In step 7, between backward and the reduction; the last checkpoint is of step 4."""
    reference, run = uninterrupted(ranks=4), tmp_path / "run"
    outcome = reference.repeat(run, "kill@step rank=2 step=7", restarts=1)
    assert outcome.code == 0, outcome.errors[-3000:]
    assert resumed(run) == [4]
    reference.assert_equals(run)
    assert processes_of(run) == []


def test_a_rank_is_killed_in_the_middle_of_a_move(
    tmp_path: Path, uninterrupted: UninterruptedRuns
) -> None:
    """In the first move after step 5, 6 or 7; the weights and places of step 4 are loaded."""
    follow = (f"parallel.placement.{key}" for key in ("kind=periodic", "every=1", "from=last"))
    reference, run = uninterrupted("parallel.ep=4", *follow, ranks=4), tmp_path / "run"
    outcome = reference.repeat(run, "kill@move rank=2 step=5 count=3", restarts=1)
    assert outcome.code == 0, outcome.errors[-3000:]
    assert resumed(run) == [4]
    reference.assert_equals(run)
    assert processes_of(run) == []


def test_a_rank_is_killed_in_the_middle_of_its_shard(tmp_path: Path, two_ranks: Reference) -> None:
    """Rank 1 is killed with half of its shard of step 10 written: it is deleted, step 5 resumed."""
    run = tmp_path / "run"
    partial = run / "checkpoints" / "step-00000010.tmp"
    fault = "kill@shard rank=1 step=10; hold@step rank=0 step=6 restarts=1"
    with job(run, *two_ranks.overrides, ranks=2, restarts=1, trace=True, fault=fault) as started:
        wait_until(
            lambda: Path(f"{run}.held").exists(),
            started,
            timeout=120,
            what="the second attempt's first step",
        )
        assert not partial.exists(), (
            "the partial checkpoint still exists while the second attempt trains"
        )
        Path(f"{run}.go").touch()
        outcome = finish(started)
    assert outcome.code == 0, outcome.errors[-3000:]
    assert resumed(run) == [5]
    assert not partial.exists()
    two_ranks.assert_equals(run)


@pytest.mark.parametrize(("point", "step"), [("before-rename", 5), ("after-rename", 10)])
def test_rank_0_is_killed_at_the_commit(
    tmp_path: Path, two_ranks: Reference, point: str, step: int
) -> None:
    """The rename creates the checkpoint: before it the old step is the newest, after it the new."""
    run = tmp_path / "run"
    outcome = two_ranks.repeat(run, f"kill@{point} rank=0 step=10", restarts=1)
    assert outcome.code == 0, outcome.errors[-3000:]
    assert resumed(run) == [step]
    two_ranks.assert_equals(run)


def test_three_kills_in_a_row(tmp_path: Path, two_ranks: Reference) -> None:
    """Every attempt forms a process group, though the store has old addresses (torch 2.13)."""
    run = tmp_path / "run"
    faults = (
        "kill@step rank=1 step=7 restarts=0",
        "kill@step rank=0 step=12 restarts=1",
        "kill@step rank=1 step=13 restarts=2",
    )
    outcome = two_ranks.repeat(run, "; ".join(faults), restarts=3)
    assert outcome.code == 0, outcome.errors[-3000:]
    assert [line["attempt"] for line in events(run, "restart")] == [1, 2, 3]
    assert resumed(run) == [5, 10, 10]
    two_ranks.assert_equals(run)
