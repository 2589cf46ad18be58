"""Drills 7, 8, 9 and SIGUSR1: all ranks stop after the same saved step, or save on request."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dmoe.checkpoint import latest, verify
from tests.cli.commands import environment
from tests.drills.conftest import Reference, UninterruptedRuns
from tests.drills.jobs import (
    DRILL,
    ROOT,
    Job,
    checkpoint_hashes,
    events,
    finish,
    job,
    losses,
    processes_of,
    wait_until,
)
from tests.forked import ForkedProcess

pytestmark = pytest.mark.drills

RUN = ("train.steps=80", "checkpoint.every=10")
LATEST = 50
"""Last step after which a signal is sent: it comes before the end."""
GRACE = 10.0
"""Target time in seconds to save and exit after a stop signal."""
BUSY = 2.5
"""Factor for a busy machine; torch's launcher kills its ranks after 30 s."""


@pytest.fixture
def reference(uninterrupted: UninterruptedRuns) -> Reference:
    return uninterrupted(*RUN, ranks=2)


def assert_resumes_to(run: Path, reference: Reference) -> None:
    """Assert that the next start completes the run with the result of the reference."""
    outcome = reference.repeat(run, fault="")
    assert outcome.code == 0, outcome.errors[-3000:]
    reference.assert_equals(run)


def assert_stopped_after(run: Path) -> int:
    """Assert an orderly stop: the last logged step is saved, no partial checkpoint; return it."""
    (end,) = events(run, "end")
    assert end["stopped"] is True
    assert end["step"] == max(losses(run)) == checkpoint_hashes(run)["step"]
    assert not list((run / "checkpoints").glob("*.tmp"))
    return int(end["step"])


def seconds_to_exit(started: Job, signalled: float) -> float:
    """Wait until the launcher and all ranks have ended; assert the limit for a busy machine."""
    assert finish(started).code != 0
    wait_until(lambda: not processes_of(started.run), what="the end of every rank")
    seconds = time.monotonic() - signalled
    print(f"ended {seconds:.2f} s after the signal; target {GRACE:.0f}")
    assert seconds < BUSY * GRACE
    return seconds


@pytest.mark.parametrize("receiver", ["launcher", "one worker"])
def test_a_stop_at_a_random_time_loses_nothing(
    receiver: str, tmp_path: Path, reference: Reference
) -> None:
    """Drills 7 and 8. DMOE_SEED repeats a random time: a step, and how long after it."""
    seed = int(os.environ.get("DMOE_SEED", random.SystemRandom().randrange(10**6)))
    rng, run = random.Random(seed), tmp_path / "run"
    with job(run, *RUN, ranks=2) as started:
        after, wait = rng.randint(1, LATEST), rng.uniform(0, 0.05)
        wait_until(lambda: started.steps() >= after, started, what=f"step {after}")
        time.sleep(wait)
        signalled = time.monotonic()
        if receiver == "launcher":
            started.signal(signal.SIGTERM)
        else:
            os.kill(started.workers()[rng.randrange(2)], signal.SIGTERM)
        print(f"DMOE_SEED={seed}: SIGTERM {wait:.2f} s after step {after}", end=", ")
        seconds_to_exit(started, signalled)
    step = assert_stopped_after(run)
    assert 1 <= step < 80, f"seed {seed}: the signal came too late to stop anything"
    assert_resumes_to(run, reference)


def test_a_stop_during_a_checkpoint_lets_it_finish(tmp_path: Path, reference: Reference) -> None:
    """Drill 9, first half: the running save completes, then the current step is saved too."""
    run = tmp_path / "run"
    outcome = reference.repeat(run, "term@fsync rank=0 step=20 call=0")
    assert outcome.code != 0
    assert assert_stopped_after(run) == 21
    assert verify(run / "checkpoints" / "step-00000020").step == 20
    assert_resumes_to(run, reference)


def test_a_second_stop_during_a_checkpoint_exits_at_once(
    tmp_path: Path, reference: Reference
) -> None:
    """Drill 9, second half, in one rank: the save is abandoned, the previous one is intact."""
    run = tmp_path / "run"
    outcome = reference.repeat(
        run, "term@fsync rank=0 step=20 call=0; term@fsync rank=0 step=20 call=1 after=0.5"
    )
    assert outcome.code != 0
    assert events(run, "end") == []
    assert checkpoint_hashes(run)["step"] == 10
    assert_resumes_to(run, reference)


def test_a_second_stop_to_the_launcher_does_not_wait_for_the_write(tmp_path: Path) -> None:
    """Drill 9, second half, by two signals to the launcher while rank 0 waits for its disk.

    A process in an uninterruptible kernel call gets no signal; torch's launcher kills it after
    30 s.
    """
    run = tmp_path / "run"
    with job(run, *RUN, ranks=2, fault="hold@fsync rank=0 step=20 call=0") as started:
        wait_until(Path(f"{run}.held").exists, started, what="the write that hangs")
        started.signal(signal.SIGTERM)
        time.sleep(1.0)
        assert len(started.workers()) == 2
        signalled = time.monotonic()
        started.signal(signal.SIGTERM)
        seconds_to_exit(started, signalled)
    newest = latest(run / "checkpoints")
    assert newest is not None
    assert newest.name == "step-00000010"


def test_a_stop_during_an_evaluation_does_not_wait_for_its_end(
    tmp_path: Path, uninterrupted: UninterruptedRuns
) -> None:
    """The next start repeats the interrupted evaluation with the same numbers."""
    run = tmp_path / "run"
    slow = ("train.steps=6", "train.eval_every=4", "train.eval_sequences=100")
    with job(run, *slow, ranks=2, fault="hold@evaluation rank=1 step=4") as started:
        wait_until(Path(f"{run}.held").exists, started, what="the evaluation after step 4")
        signalled = time.monotonic()
        os.kill(started.workers()[1], signal.SIGTERM)
        Path(f"{run}.go").touch()
        seconds_to_exit(started, signalled)
    assert assert_stopped_after(run) == 4
    assert events(run, "eval") == []
    reference = uninterrupted(*slow, ranks=2)
    assert_resumes_to(run, reference)
    assert held_out(run) == held_out(reference.run)


def held_out(run: Path) -> list[tuple[int, str]]:
    """Return step and loss (hex) of every evaluation."""
    return [(line["step"], line["loss"].hex()) for line in events(run, "eval")]


def additional_saves(run: Path, every: int = 10) -> set[int]:
    """Return the saved steps that `checkpoint.every` does not require."""
    saved = {line["step"] for line in events(run, "checkpoint")}
    return {step for step in saved if step % every and step != 80}


def test_usr1_to_one_rank_saves_on_all_and_changes_nothing_else(
    tmp_path: Path, reference: Reference
) -> None:
    """Rank 1 waits in step 13; a signal at any time could ask for a step that is saved anyway."""
    run = tmp_path / "run"
    fault = "hold@step rank=1 step=13"
    with job(run, *RUN, "checkpoint.keep=9", ranks=2, fault=fault) as started:
        wait_until(Path(f"{run}.held").exists, started, what="step 13")
        os.kill(started.workers()[1], signal.SIGUSR1)
        Path(f"{run}.go").touch()
        outcome = finish(started)
    assert outcome.code == 0, outcome.errors
    (step,) = additional_saves(run)
    assert step in (13, 14), "this step or the next"
    assert verify(run / "checkpoints" / f"step-{step:08d}").step == step
    reference.assert_equals(run)


@contextmanager
def own_launcher(run: Path, *overrides: str) -> Iterator[Job]:
    """Run `dmoe train --ranks 2 ...`; kill all its processes at the end."""
    arguments = ["train", *DRILL, f"train.run_dir={run}", *overrides, "--ranks", "2"]
    env = environment() | {"PYTHONPATH": str(ROOT), "DMOE_DRILL": str(run)}
    process = ForkedProcess("dmoe", arguments, run.parent, env)
    try:
        yield Job(process, run)
    finally:
        process.kill()
        process.communicate()
        wait_until(lambda: not processes_of(run), what="the end of every rank")


def test_usr1_to_the_launcher_of_dmoe_train_reaches_the_ranks(
    tmp_path: Path, uninterrupted: UninterruptedRuns
) -> None:
    """torch's launcher forwards TERM, INT, HUP and QUIT only and dies of USR1; ours forwards USR1.

    The ranks get it one after another, which once made two checkpoints: one per rank's signal. No
    step is saved that the signal could hit by chance.
    """
    run, rare = tmp_path / "run", ("train.steps=80", "checkpoint.every=100")
    reference = uninterrupted(*rare, ranks=2)
    with own_launcher(run, *rare, "checkpoint.keep=9") as started:
        wait_until(lambda: started.steps() >= 3, started, what="step 3")
        started.signal(signal.SIGUSR1)
        outcome = finish(started)
    assert outcome.code == 0, outcome.errors
    assert len(additional_saves(run, every=100)) == 1
    reference.assert_equals(run)
