"""Drills 16 and 17: a full disk. The save fails on all ranks; the run stops or continues."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmoe.checkpoint import verify
from tests.drills.jobs import (
    Outcome,
    checkpoint_hashes,
    events,
    finish,
    job,
    losses,
    start,
    wait_until,
)

pytestmark = pytest.mark.drills

BACKGROUND = "checkpoint.asynchronous=true"
FULL = "No space left on device"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount 1.7 MB at `checkpoints` of a run directory: enough for two checkpoints and a half."""
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


def verified_steps(run: Path) -> list[int]:
    """Verify all checkpoints and return their steps; other files are an error."""
    return [verify(path).step for path in sorted((run / "checkpoints").iterdir())]


def failures(run: Path) -> list[dict[str, object]]:
    return [line for line in events(run, "alert") if "checkpoint failed" in line["text"]]


def assert_ended_by_full_disk(outcome: Outcome, run: Path) -> None:
    """Assert one line on stderr, and exit code 3 of a rank in the launcher's report."""
    assert outcome.code != 0
    assert "exitcode  : 3" in outcome.errors, outcome.errors[-3000:]
    (line,) = [line for line in outcome.errors.splitlines() if line.startswith("dmoe: ")]
    assert FULL in line
    assert events(run, "end") == []


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_ends_the_run_and_keeps_intact_checkpoints(
    small_disk: Path, asynchronous: bool
) -> None:
    run = small_disk
    outcome = start(run, "checkpoint.every=3", f"checkpoint.asynchronous={asynchronous}", ranks=2)
    assert_ended_by_full_disk(outcome, run)
    assert len(failures(run)) == 1
    assert verified_steps(run) == [3, 6]


def test_a_run_with_on_error_continue_survives_a_full_disk(small_disk: Path) -> None:
    """Another file fills the disk, and is deleted when the first save has failed."""
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
        wait_until(
            lambda: started.steps() > 0 and bool(failures(run)), started, what="the save that fails"
        )
        filler.unlink()
        outcome = finish(started)
    assert outcome.code == 0, outcome.errors[-3000:]
    assert FULL in str(failures(run)[0]["text"])
    assert failures(run)[0]["step"] == 10
    assert sorted(losses(run)) == list(range(1, 61))
    assert verified_steps(run) == [60]


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_failed_background_save_is_reported_soon(tmp_path: Path, policy: str) -> None:
    """Only the writer thread of rank 1 fails; the reduction of the next steps reports it."""
    run = tmp_path / "run"
    steps = ("train.steps=40", "checkpoint.every=20", f"checkpoint.on_error={policy}")
    outcome = start(run, BACKGROUND, *steps, ranks=2, fault="full@fsync rank=1 step=20")
    (failure,) = failures(run)
    assert FULL in str(failure["text"])
    assert "rank 1" in str(failure["text"])
    assert 20 < int(str(failure["step"])) < 40, "reported at the next save only"
    assert [line["step"] for line in events(run, "checkpoint")] == (
        [] if policy == "stop" else [40]
    )
    if policy == "stop":
        assert_ended_by_full_disk(outcome, run)
        assert verified_steps(run) == []
    else:
        assert outcome.code == 0, outcome.errors[-3000:]
        assert verified_steps(run) == [40]


def test_the_last_save_must_succeed_with_every_policy(tmp_path: Path) -> None:
    """Drill 17: no step follows the last save, so the run waits for it and fails with it."""
    run = tmp_path / "run"
    outcome = start(
        run, BACKGROUND, "checkpoint.on_error=continue", ranks=2, fault="full@fsync rank=1 step=12"
    )
    assert_ended_by_full_disk(outcome, run)
    assert verified_steps(run) == [4, 8]
    assert checkpoint_hashes(run)["step"] == 8
