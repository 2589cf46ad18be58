"""Drills 1, 2, 3 and 5: ranks that are killed, in a step and around a checkpoint. torchrun starts again, and not one bit differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.drills.conftest import Reference, Unbroken
from tests.drills.jobs import events, finish, job, processes_of, until

pytestmark = pytest.mark.drills


def resumed(run: Path) -> list[int]:
    """The step each restart went on from."""
    return [line["resumed_from"] for line in events(run, "restart")]


def test_a_rank_of_four_is_killed_inside_a_step(tmp_path: Path, unbroken: Unbroken) -> None:
    """Step 7, between backward and the ranks' one reduction; the last checkpoint is of step 4."""
    reference, run = unbroken(ranks=4), tmp_path / "run"
    outcome = reference.again(run, "kill@step rank=2 step=7", restarts=1)
    assert outcome.code == 0, outcome.errors[-3000:]
    assert resumed(run) == [4]
    reference.equals(run)
    assert processes_of(run) == []


def test_a_rank_is_killed_in_the_middle_of_its_shard(tmp_path: Path, two_ranks: Reference) -> None:
    """Rank 1 dies with half of its shard of step 10 written. Step 5 is taken up, and what was written of step 10 is gone first."""
    run = tmp_path / "run"
    partial = run / "checkpoints" / "step-00000010.tmp"
    fault = "kill@shard rank=1 step=10; hold@step rank=0 step=6 restarts=1"
    with job(run, *two_ranks.overrides, ranks=2, restarts=1, trace=True, fault=fault) as started:
        until(
            lambda: Path(f"{run}.held").exists(),
            started,
            timeout=120,
            what="the second attempt's first step",
        )
        assert not partial.exists(), (
            "the second attempt trains beside the partial checkpoint of the first"
        )
        Path(f"{run}.go").touch()
        outcome = finish(started)
    assert outcome.code == 0, outcome.errors[-3000:]
    assert resumed(run) == [5]
    assert not partial.exists()
    two_ranks.equals(run)


@pytest.mark.parametrize(("point", "step"), [("before-rename", 5), ("after-rename", 10)])
def test_rank_0_is_killed_at_the_commit(
    tmp_path: Path, two_ranks: Reference, point: str, step: int
) -> None:
    """The rename makes the checkpoint: a moment before, the old step is the newest; a moment after, the new one. There is no third."""
    run = tmp_path / "run"
    outcome = two_ranks.again(run, f"kill@{point} rank=0 step=10", restarts=1)
    assert outcome.code == 0, outcome.errors[-3000:]
    assert resumed(run) == [step]
    two_ranks.equals(run)


def test_three_kills_in_a_row(tmp_path: Path, two_ranks: Reference) -> None:
    """Each attempt finds a working process group, though the dead ranks' addresses are in the launcher's store (torch 2.13)."""
    run = tmp_path / "run"
    faults = (
        "kill@step rank=1 step=7 restarts=0",
        "kill@step rank=0 step=12 restarts=1",
        "kill@step rank=1 step=13 restarts=2",
    )
    outcome = two_ranks.again(run, "; ".join(faults), restarts=3)
    assert outcome.code == 0, outcome.errors[-3000:]
    assert [line["attempt"] for line in events(run, "restart")] == [1, 2, 3]
    assert resumed(run) == [5, 10, 10]
    two_ranks.equals(run)
