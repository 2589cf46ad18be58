"""Drills 7, 8, 9 and SIGUSR1: who is told to stop stops on all ranks after the same step, saved; who is told to save, saves."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dmoe.checkpoint import latest, verify
from tests.cli.commands import environment
from tests.drills.conftest import Reference, Unbroken
from tests.drills.jobs import (
    DRILL,
    ROOT,
    Job,
    events,
    finish,
    footprint,
    job,
    losses,
    processes_of,
    until,
)

pytestmark = pytest.mark.drills

RUN = ("train.steps=80", "checkpoint.every=10")
"""About three seconds of training on a quiet machine: a signal in the first 1.5 comes before the end."""
GRACE = 10.0
"""Seconds in which a job that is told to stop should have saved and gone."""
BUSY = 2.5
"""What a test allows on a machine that others use: no more, since torch's launcher kills after 30 s whoever has not gone."""


@pytest.fixture
def reference(unbroken: Unbroken) -> Reference:
    return unbroken(*RUN, ranks=2)


def goes_on_as(run: Path, reference: Reference) -> None:
    """The next start of this run takes it to the end, and nothing shows that it was ever stopped."""
    outcome = reference.again(run, fault="")
    assert outcome.code == 0, outcome.errors[-3000:]
    reference.equals(run)


def left_after(run: Path) -> int:
    """The step after which an orderly stop has left: the last one logged, saved whole, with nothing half-written beside it."""
    (end,) = events(run, "end")
    assert end["stopped"] is True
    assert end["step"] == max(losses(run)) == footprint(run)["step"]
    assert not list((run / "checkpoints").glob("*.tmp"))
    return int(end["step"])


def seconds_to_leave(started: Job, signalled: float) -> float:
    """Until the launcher and every rank are gone; the figure a person wants to see is printed, the bound is for a busy machine."""
    assert finish(started).code != 0
    until(lambda: not processes_of(started.run), what="the end of every rank")
    seconds = time.monotonic() - signalled
    print(f"gone {seconds:.2f} s after the signal; should be {GRACE:.0f}")
    assert seconds < BUSY * GRACE
    return seconds


@pytest.mark.parametrize("told", ["launcher", "one worker"])
def test_a_stop_at_a_random_moment_costs_nothing(
    told: str, tmp_path: Path, reference: Reference
) -> None:
    """Drills 7 and 8. DMOE_SEED repeats a moment."""
    seed = int(os.environ.get("DMOE_SEED", random.SystemRandom().randrange(10**6)))
    chance, run = random.Random(seed), tmp_path / "run"
    with job(run, *RUN, ranks=2) as started:
        until(lambda: started.steps() >= 1, started, what="step 1")
        wait = chance.uniform(0, 1.5)
        time.sleep(wait)
        signalled = time.monotonic()
        if told == "launcher":
            started.signal(signal.SIGTERM)
        else:
            os.kill(started.workers()[chance.randrange(2)], signal.SIGTERM)
        print(f"DMOE_SEED={seed}: SIGTERM {wait:.2f} s after step 1", end=", ")
        seconds_to_leave(started, signalled)
    step = left_after(run)
    assert 1 <= step < 80, f"seed {seed}: the signal came too late to stop anything"
    goes_on_as(run, reference)


def test_a_stop_during_a_checkpoint_lets_it_finish(tmp_path: Path, reference: Reference) -> None:
    """Drill 9, first half: the checkpoint under way becomes whole, then the step that noticed the signal is saved as well."""
    run = tmp_path / "run"
    outcome = reference.again(run, "term@fsync rank=0 step=20 call=0")
    assert outcome.code != 0
    assert left_after(run) == 21
    assert verify(run / "checkpoints" / "step-00000020").step == 20
    goes_on_as(run, reference)


def test_a_second_stop_during_a_checkpoint_is_obeyed_at_once(
    tmp_path: Path, reference: Reference
) -> None:
    """Drill 9, second half, in one rank: the step that was being written never was, the one before it is whole."""
    run = tmp_path / "run"
    outcome = reference.again(
        run, "term@fsync rank=0 step=20 call=0; term@fsync rank=0 step=20 call=1 after=0.5"
    )
    assert outcome.code != 0
    assert events(run, "end") == []
    assert footprint(run)["step"] == 10
    goes_on_as(run, reference)


def test_a_second_stop_to_the_launcher_does_not_wait_for_the_write(tmp_path: Path) -> None:
    """Drill 9, second half, as an impatient person does it, while rank 0 waits for its disk. (A process that the kernel itself holds
    hears no signal: torch's launcher gives it 30 s, and then kills it.)"""
    run = tmp_path / "run"
    with job(run, *RUN, ranks=2, fault="hold@fsync rank=0 step=20 call=0") as started:
        until(Path(f"{run}.held").exists, started, what="the write that hangs")
        started.signal(signal.SIGTERM)
        time.sleep(1.0)
        assert len(started.workers()) == 2
        signalled = time.monotonic()
        started.signal(signal.SIGTERM)
        seconds_to_leave(started, signalled)
    newest = latest(run / "checkpoints")
    assert newest is not None
    assert newest.name == "step-00000010"


def test_a_stop_during_an_evaluation_does_not_wait_for_its_end(
    tmp_path: Path, unbroken: Unbroken
) -> None:
    """The evaluation that was cut short is made up for by the next start, with the numbers it would have had."""
    run = tmp_path / "run"
    slow = ("train.steps=6", "train.eval_every=4", "train.eval_sequences=2000")
    with job(run, *slow, ranks=2) as started:
        until(
            lambda: started.steps() >= 4 and bool(events(run, "checkpoint")),
            started,
            what="the evaluation after step 4",
        )
        signalled = time.monotonic()
        os.kill(started.workers()[1], signal.SIGTERM)
        seconds_to_leave(started, signalled)
    assert left_after(run) == 4
    assert events(run, "eval") == []
    reference = unbroken(*slow, ranks=2)
    goes_on_as(run, reference)
    assert held_out(run) == held_out(reference.run)


def held_out(run: Path) -> list[tuple[int, str]]:
    """Every evaluation: after which step, and its loss to the bit."""
    return [(line["step"], line["loss"].hex()) for line in events(run, "eval")]


def saved_unasked(run: Path) -> set[int]:
    """Steps that were saved though `checkpoint.every` did not say so."""
    return {line["step"] for line in events(run, "checkpoint") if line["step"] % 10}


def test_usr1_to_one_rank_saves_on_all_and_changes_nothing_else(
    tmp_path: Path, reference: Reference
) -> None:
    run = tmp_path / "run"
    with job(run, *RUN, "checkpoint.keep=9", ranks=2) as started:
        until(lambda: started.steps() >= 3, started, what="step 3")
        os.kill(started.workers()[1], signal.SIGUSR1)
        outcome = finish(started)
    assert outcome.code == 0, outcome.errors
    (step,) = saved_unasked(run)
    assert verify(run / "checkpoints" / f"step-{step:08d}").step == step
    reference.equals(run)


@contextmanager
def own_launcher(run: Path, *overrides: str) -> Iterator[Job]:
    """`dmoe train --ranks 2 ...`; nothing of it outlives the block."""
    command = [
        sys.executable,
        "-m",
        "dmoe",
        "train",
        *DRILL,
        f"train.run_dir={run}",
        *overrides,
        "--ranks",
        "2",
    ]
    env = environment() | {"PYTHONPATH": str(ROOT), "DMOE_DRILL": str(run)}
    process = subprocess.Popen(
        command, cwd=run.parent, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield Job(process, run)
    finally:
        process.kill()
        process.communicate()
        until(lambda: not processes_of(run), what="the end of every rank")


def test_usr1_to_the_launcher_of_dmoe_train_reaches_the_ranks(
    tmp_path: Path, reference: Reference
) -> None:
    """torch's launcher passes on TERM, INT, HUP and QUIT only, and dies of USR1; ours passes that one on as well.

    It reaches the ranks one after another, and once it made two checkpoints: of the step in which the first rank had heard of it, and
    of the next, in which the second had.
    """
    run = tmp_path / "run"
    with own_launcher(run, *RUN, "checkpoint.keep=9") as started:
        until(lambda: started.steps() >= 3, started, what="step 3")
        started.signal(signal.SIGUSR1)
        outcome = finish(started)
    assert outcome.code == 0, outcome.errors
    assert len(saved_unasked(run)) == 1
    reference.equals(run)
