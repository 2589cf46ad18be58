"""Drills 16 and 17: the disk is full. The save fails on all ranks, what it left is gone, the run ends or goes on as the config says."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmoe.checkpoint import verify
from tests.drills.jobs import Outcome, events, finish, footprint, job, losses, start, until

pytestmark = pytest.mark.drills

BACKGROUND = "checkpoint.asynchronous=true"
FULL = "No space left on device"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A run directory whose `checkpoints` is a file system of 1.7 MB: room for two checkpoints, and half of a third."""
    run = tmp_path / "run"
    disk = run / "checkpoints"
    disk.mkdir(parents=True)
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1700k", "tmpfs", disk],
        capture_output=True,
        text=True,
        check=False,
    )
    if mount.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mount.stderr.strip()}")
    try:
        yield run
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def whole_steps(run: Path) -> list[int]:
    """Every checkpoint there is, all proven; and there is nothing else."""
    return [verify(path).step for path in sorted((run / "checkpoints").iterdir())]


def failures(run: Path) -> list[dict[str, object]]:
    return [line for line in events(run, "alert") if "checkpoint failed" in line["text"]]


def ended_by_a_full_disk(outcome: Outcome, run: Path) -> None:
    """One line and exit code 3 from a rank, which torch's launcher reports."""
    assert outcome.code != 0
    assert "exitcode  : 3" in outcome.errors, outcome.errors[-3000:]
    (line,) = [line for line in outcome.errors.splitlines() if line.startswith("dmoe: ")]
    assert FULL in line
    assert events(run, "end") == []


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_ends_the_run_and_leaves_what_was_whole(
    small_disk: Path, asynchronous: bool
) -> None:
    run = small_disk
    outcome = start(run, "checkpoint.every=3", f"checkpoint.asynchronous={asynchronous}", ranks=2)
    ended_by_a_full_disk(outcome, run)
    assert len(failures(run)) == 1
    assert whole_steps(run) == [3, 6]


def test_a_run_that_may_go_on_outlives_a_full_disk(small_disk: Path) -> None:
    """Somebody else's file takes the room, and is deleted when the first save has failed."""
    run = small_disk
    filler = run / "checkpoints" / "filler"
    filler.write_bytes(bytes(1_500_000))
    steps = (
        "train.steps=60",
        "checkpoint.every=10",
        "checkpoint.keep=1",
        "checkpoint.on_error=continue",
    )
    with job(run, *steps, ranks=2) as started:
        until(
            lambda: started.steps() > 0 and bool(failures(run)), started, what="the save that fails"
        )
        filler.unlink()
        outcome = finish(started)
    assert outcome.code == 0, outcome.errors[-3000:]
    assert FULL in str(failures(run)[0]["text"])
    assert failures(run)[0]["step"] == 10
    assert sorted(losses(run)) == list(range(1, 61))
    assert whole_steps(run) == [60]


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_background_save_that_fails_is_heard_of_soon_after(tmp_path: Path, policy: str) -> None:
    """Only the writer's thread, and only of rank 1, finds the disk full. The steps after it learn of it in their one reduction."""
    run = tmp_path / "run"
    steps = ("train.steps=40", "checkpoint.every=20", f"checkpoint.on_error={policy}")
    outcome = start(run, BACKGROUND, *steps, ranks=2, fault="full@fsync rank=1 step=20")
    (failure,) = failures(run)
    assert FULL in str(failure["text"])
    assert "rank 1" in str(failure["text"])
    assert 20 < int(str(failure["step"])) < 40, "it surfaced at the next save only"
    assert [line["step"] for line in events(run, "checkpoint")] == (
        [] if policy == "stop" else [40]
    )
    if policy == "stop":
        ended_by_a_full_disk(outcome, run)
        assert whole_steps(run) == []
    else:
        assert outcome.code == 0, outcome.errors[-3000:]
        assert whole_steps(run) == [40]


def test_the_last_save_has_to_succeed_whatever_the_policy(tmp_path: Path) -> None:
    """Drill 17, at `wait`: no step follows that could tell, so the end of the run waits for the writer and fails with it."""
    run = tmp_path / "run"
    outcome = start(
        run, BACKGROUND, "checkpoint.on_error=continue", ranks=2, fault="full@fsync rank=1 step=12"
    )
    ended_by_a_full_disk(outcome, run)
    assert whole_steps(run) == [4, 8]
    assert footprint(run)["step"] == 8
