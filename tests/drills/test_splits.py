"""Fault 14: one rank sends a row less or more than its peer expects: all ranks stop.

With `debug.collectives`; gloo itself reports no error and leaves the missing rows undefined.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dmoe.distributed.all_to_all import ExpertGroup
from dmoe.runs.metrics_log import read_metrics
from tests.drills.worker import run_ranks, train_with_fault

pytestmark = pytest.mark.drills

STEP, LAYER = 6, 1
"""Step (from 0) and MoE layer of the wrong count on rank 1."""


def miscount(difference: int, operation: str, rank: int) -> None:
    """Let rank 1 send `difference` rows more to rank 0 than the counts that it sent."""
    all_to_all = ExpertGroup.all_to_all

    def faulty(self: ExpertGroup, rows: Any, send: Any, receive: Any, current: str) -> Any:
        if (
            current == operation
            and self.layer == LAYER
            and self.checker is not None
            and self.checker.step == STEP
        ):
            send = [send[0] + difference, *send[1:]]
            rows = torch.cat([rows, rows[:1]])[: sum(send)]
        return all_to_all(self, rows, send, receive, current)

    if rank == 1:
        ExpertGroup.all_to_all = faulty  # type: ignore[method-assign]


@pytest.mark.parametrize("operation", ["dispatch", "combine", "dispatch backward"])
@pytest.mark.parametrize("difference", [-1, 1])
def test_a_missing_or_extra_row_stops_all_ranks_with_its_place(
    difference: int, operation: str, tmp_path: Path
) -> None:
    run, overrides = tmp_path / "run", ("debug.collectives=true", "checkpoint.every=2")
    endings = run_ranks(
        2, train_with_fault, run, overrides, "", partial(miscount, difference, operation)
    )
    assert endings[0] == endings[1]
    assert endings[0].code == 1
    found = re.search(
        rf"step {STEP}, MoE layer {LAYER}, {operation}: "
        r"rank 1 sends (\d+) rows to rank 0, which expects (\d+)$",
        endings[0].text,
    )
    assert found, endings[0].text
    assert int(found[1]) - int(found[2]) == difference
    lines = read_metrics(run / "metrics.jsonl")
    assert max(line["step"] for line in lines) == STEP, "the step with the wrong count was applied"
