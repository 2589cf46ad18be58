"""Faults 26 and 27: bad steps, from one to too many.

Most tests run the real trainer in two ranks of `run_ranks`. Two jobs at the end test with torch's
launcher the exit code and that the job is not retried.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dmoe.runs.metrics_log import read_metrics
from tests.drills.jobs import Outcome, events, start
from tests.drills.worker import RankOutcome, alerts, run_ranks, train_with_fault

pytestmark = pytest.mark.drills

LONG = ("train.steps=30", "guard.spike_window=8", "guard.patience=5")
"""Spikes are detected from the third good loss on."""
NUMBERS = 4


def train(run: Path, fault: str, *overrides: str) -> tuple[RankOutcome, list[dict[str, Any]]]:
    """Train on two ranks; return their common result and all lines of metrics.jsonl."""
    here, there = run_ranks(2, train_with_fault, run, (*LONG, *overrides), fault)
    assert here == there
    return here, read_metrics(run / "metrics.jsonl", include_void=True)


def rollbacks(lines: list[dict[str, Any]]) -> list[int]:
    return [line["step"] for line in lines if line["event"] == "rollback"]


def steps_in(lines: list[dict[str, Any]]) -> list[int]:
    return [line["step"] for line in lines if line["event"] == "train"]


def test_bad_steps_are_skipped_and_reported_with_their_samples(tmp_path: Path) -> None:
    """Twice four in a row, one less than guard.patience; the good step between resets the count."""
    ending, lines = train(
        tmp_path / "run", "nan@step rank=1 step=6 count=4; inf@step rank=0 step=11 count=4"
    )
    assert ending.code == 0, ending.text
    texts = alerts(lines, "not finite and skipped on all ranks")
    assert [int(re.findall(r"step (\d+)", text)[0]) for text in texts] == [
        6,
        7,
        8,
        9,
        11,
        12,
        13,
        14,
    ]
    assert "samples 40 to 47" in texts[0], "eight sequences a step, counted from 0"
    assert steps_in(lines) == list(range(1, 31))
    assert [
        line["step"] for line in lines if line["event"] == "train" and line["loss"] is None
    ] == [6, 7, 8, 9, 11, 12, 13, 14]
    assert rollbacks(lines) == []


def test_continuing_bad_steps_roll_back_once_and_then_stop(tmp_path: Path) -> None:
    """guard.patience ends at step 10. No checkpoint is made among bad steps: back to step 4."""
    ending, lines = train(tmp_path / "run", "nan@step rank=1 step=6 count=20")
    assert ending.code == NUMBERS
    assert rollbacks(lines) == [4]
    assert len(alerts(lines, "not finite and rolled back")) == 1
    assert ending.text.startswith("step 10 is not finite and stopped on all ranks")
    assert "5 bad steps in a row" in ending.text
    assert alerts(lines, ending.text) == [ending.text]


def test_without_a_checkpoint_the_run_stops(tmp_path: Path) -> None:
    ending, lines = train(tmp_path / "run", "nan@step rank=0 step=2 count=20", "checkpoint.every=0")
    assert ending.code == NUMBERS
    assert rollbacks(lines) == []
    assert max(steps_in(lines)) == 5


@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_the_stricter_policies_do_not_wait_for_patience(tmp_path: Path, policy: str) -> None:
    ending, lines = train(tmp_path / "run", "nan@step rank=1 step=6", f"guard.nonfinite={policy}")
    assert ending.code == NUMBERS
    assert rollbacks(lines) == ([4] if policy == "rollback" else [])
    assert max(steps_in(lines)) == 5


@pytest.mark.parametrize(("policy", "word"), [("warn", "taken"), ("skip", "skipped")])
def test_one_spike_is_reported_or_skipped(tmp_path: Path, policy: str, word: str) -> None:
    """The losses after a spike are normal, whether its step is applied or skipped."""
    ending, lines = train(tmp_path / "run", "spike@step rank=0 step=12", f"guard.spike={policy}")
    assert ending.code == 0, ending.text
    assert (
        len(alerts(lines, f"step 12 is a spike and {word} on all ranks", "samples 88 to 95")) == 1
    )
    assert alerts(lines, "is a spike") == alerts(lines, "step 12 is a spike")
    assert steps_in(lines) == list(range(1, 31))
    loss = {line["step"]: line["loss"] for line in lines if line["event"] == "train"}
    assert loss[12] > 5 * loss[11]
    assert all(loss[step] < 2 * loss[11] for step in range(13, 31)), (
        "the guard's memory holds good losses only"
    )


@pytest.mark.parametrize("policy", ["warn", "skip"])
def test_a_spike_that_stays_ends_the_run(tmp_path: Path, policy: str) -> None:
    """The fifth of 20 bad steps ends the run, without a rollback: samples would be the same."""
    ending, lines = train(
        tmp_path / "run", "spike@step rank=1 step=12 count=20", f"guard.spike={policy}"
    )
    assert ending.code == NUMBERS
    assert ending.text.startswith("step 16 is a spike and stopped on all ranks")
    assert rollbacks(lines) == []


@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_the_stricter_policies_for_a_spike(tmp_path: Path, policy: str) -> None:
    """After the rollback the same spike occurs again, so the run stops."""
    ending, lines = train(tmp_path / "run", "spike@step rank=1 step=12", f"guard.spike={policy}")
    assert ending.code == NUMBERS
    assert ending.text.startswith("step 12 is a spike and stopped on all ranks")
    assert rollbacks(lines) == ([8] if policy == "rollback" else [])


def test_nan_counts_as_a_spike(tmp_path: Path) -> None:
    """Three spikes and two NaN are five bad steps in a row, not three and two."""
    ending, lines = train(
        tmp_path / "run", "nan@step rank=0 step=12 count=2; spike@step rank=1 step=14 count=3"
    )
    assert ending.code == NUMBERS
    assert ending.text.startswith("step 16 is a spike and stopped")
    assert len(alerts(lines, "not finite and skipped")) == 2


def test_a_failed_background_save_does_not_prevent_a_rollback(tmp_path: Path) -> None:
    """`rollback` waits for the writer; its error once ended a run with on_error=continue."""
    settings = (
        "checkpoint.asynchronous=true",
        "checkpoint.on_error=continue",
        "guard.nonfinite=rollback",
    )
    ending, lines = train(
        tmp_path / "run", "full@fsync rank=1 step=8; nan@step rank=0 step=9", *settings
    )
    assert ending.code == NUMBERS, ending.text
    assert rollbacks(lines) == [4]
    assert alerts(lines, "checkpoint failed", "No space left on device")


def assert_not_retried(outcome: Outcome, run: Path) -> None:
    """Assert that the second attempt ended with the message of the first, before training."""
    assert outcome.code != 0
    codes = [int(code) for code in re.findall(r"exitcode: (-?\d+)", outcome.errors)]
    assert codes == [NUMBERS, NUMBERS], outcome.errors[-3000:]
    first, second = [line for line in outcome.errors.splitlines() if line.startswith("dmoe: ")]
    assert second == f"dmoe: not tried again: {first.removeprefix('dmoe: ')}"
    assert "Traceback" not in first
    assert len(events(run, "start")) == 1
    assert events(run, "restart") == []


def test_a_job_that_cannot_be_trained_is_not_tried_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = start(
        run, *LONG, ranks=2, restarts=1, fault="nan@step rank=1 step=6 count=20 restarts=any"
    )
    assert_not_retried(outcome, run)
    assert len(events(run, "rollback")) == 1
    assert "samples 40 to 47" in alerts(events(run, "alert"), "step 6 ")[0]


def test_a_job_with_a_spike_that_stays_is_not_tried_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = start(
        run, *LONG, ranks=2, restarts=1, fault="spike@step rank=1 step=12 count=20 restarts=any"
    )
    assert_not_retried(outcome, run)
    assert "a restart would reach the same ones" in outcome.errors
