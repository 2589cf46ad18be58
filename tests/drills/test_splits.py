"""Fault 14: in a training run one rank sends a row less, or more, than its peer expects. All ranks hear of it before the step is taken.

With `debug.collectives`: gloo itself takes such an exchange in silence, and the rows that are missing are whatever was in memory.
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
from tests.drills.worker import run_ranks, train_inside

pytestmark = pytest.mark.drills

STEP, LAYER = 6, 1
"""The step, from 0, and the MoE layer in which rank 1 miscounts."""


def miscount(difference: int, operation: str, rank: int) -> None:
    """Rank 1 sends `difference` rows more to rank 0 than it has said in the counts; the rows themselves are there."""
    move = ExpertGroup.all_to_all

    def faulty(self: ExpertGroup, rows: Any, send: Any, receive: Any, what: str) -> Any:
        if (
            what == operation
            and self.layer == LAYER
            and self.checker is not None
            and self.checker.step == STEP
        ):
            send = [send[0] + difference, *send[1:]]
            rows = torch.cat([rows, rows[:1]])[: sum(send)]
        return move(self, rows, send, receive, what)

    if rank == 1:
        ExpertGroup.all_to_all = faulty  # type: ignore[method-assign]


@pytest.mark.parametrize("operation", ["dispatch", "combine", "dispatch backward"])
@pytest.mark.parametrize("difference", [-1, 1])
def test_a_row_too_few_or_too_many_stops_all_ranks_and_is_named(
    difference: int, operation: str, tmp_path: Path
) -> None:
    run, overrides = tmp_path / "run", ("debug.collectives=true", "checkpoint.every=2")
    endings = run_ranks(
        2, train_inside, run, overrides, "", partial(miscount, difference, operation)
    )
    assert endings[0] == endings[1]
    assert endings[0].code == 1
    found = re.search(
        rf"step {STEP}, MoE layer {LAYER}, {operation}: rank 1 sends (\d+) rows to rank 0, which expects (\d+)$",
        endings[0].text,
    )
    assert found, endings[0].text
    assert int(found[1]) - int(found[2]) == difference
    lines = read_metrics(run / "metrics.jsonl")
    assert max(line["step"] for line in lines) == STEP, (
        "as many steps were done before; the broken one was not"
    )
