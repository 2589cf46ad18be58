"""Fault 22: after three failed saves with checkpoint.keep=2, both older checkpoints load.

accelerate deletes the old checkpoint before it writes the new one: three failed saves leave none.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dmoe.checkpoint import verify
from dmoe.runs.metrics_log import read_metrics
from tests.drills.worker import alerts, run_ranks, train_with_fault

pytestmark = pytest.mark.drills

KEEP = ("checkpoint.keep=2", "checkpoint.every=4", "checkpoint.on_error=continue", "train.steps=22")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_three_failed_saves_keep_the_two_before_them(tmp_path: Path, asynchronous: bool) -> None:
    """Steps 4 and 8 are saved; 12, 16 and 20 fail on rank 1, and so does the last: exit code 3."""
    run, full = tmp_path / "run", "full@fsync rank=1 step=9 count=90"
    endings = run_ranks(
        2, train_with_fault, run, (*KEEP, f"checkpoint.asynchronous={asynchronous}"), full
    )
    assert [ending.code for ending in endings] == [3, 3], endings
    assert "step-00000022" in endings[0].text
    lines = read_metrics(run / "metrics.jsonl")
    failed = alerts(lines, "checkpoint failed", "No space left on device")
    assert [
        next(step for step in ("12", "16", "20") if f"step-000000{step}" in text)
        for text in failed[:3]
    ] == [
        "12",
        "16",
        "20",
    ]
    paths = sorted((run / "checkpoints").iterdir())
    assert [path.name for path in paths] == ["step-00000004", "step-00000008"]
    assert [verify(path).step for path in paths] == [4, 8]
    assert run_ranks(2, train_with_fault, run, KEEP)[0].code == 0
    assert (
        next(line for line in read_metrics(run / "metrics.jsonl") if line["event"] == "restart")[
            "resumed_from"
        ]
        == 8
    )
