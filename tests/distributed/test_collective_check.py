"""`debug.collectives`: a mismatch between ranks is raised on all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dmoe.config.schema import CapacityConfig
from dmoe.distributed.all_to_all import ExpertGroup
from dmoe.distributed.collective_check import CollectiveChecker, CollectiveCheckError
from dmoe.distributed.expert_parallel import shard_experts
from dmoe.distributed.mesh import build_mesh
from dmoe.moe.layer import MoE
from tests.distributed.runs import trace
from tests.ranks import run_ranks
from tests.tiny import tiny

pytestmark = pytest.mark.ranks

FAULTS = {
    "one row short": "sends",
    "one row long": "sends",
    "one exchange skipped": "rank 0 is at step 3, MoE layer 0",
    "another width": "rows of 4 float32 values",
    "late": "did not reach step 3, MoE layer 0, dispatch",
}


def run_with_fault(rank: int, world: int, fault: str) -> str:
    """Return the error of this rank when rank 1 does something else."""
    mesh = build_mesh(world, torch.device("cpu"))
    assert mesh.ep_group is not None
    # short only where it is to pass: a rank that is slow to start must not look late
    checker = CollectiveChecker(mesh.ep_group, timeout=3.0 if fault == "late" else 40.0)
    checker.step = 3
    layer = MoE(8, 8, 4, 2, capacity=CapacityConfig(factor=1.0))
    shard_experts(layer, mesh, checker)
    torch.manual_seed(rank)
    if rank == 1:
        _break(fault, layer)
    try:
        for _ in range(2):
            layer(torch.randn(2, 8, 8)).y.sum().backward()
    except CollectiveCheckError as error:
        return str(error)
    return "nothing"


def _break(fault: str, layer: MoE) -> None:
    route, move = layer.packed.expert_group, ExpertGroup.all_to_all  # type: ignore[attr-defined]

    def faulty(self: ExpertGroup, rows: Any, send: Any, receive: Any, operation: str) -> Any:
        if operation == "dispatch" and fault == "one exchange skipped":
            return rows.new_zeros(sum(receive), rows.shape[1])
        if operation == "dispatch" and fault == "another width":
            rows = rows[:, :4]
        if operation == "dispatch" and fault == "late":
            raise CollectiveCheckError("this rank never comes")
        if operation == "dispatch" and fault.startswith("one row"):
            less = 1 if fault.endswith("short") else -1
            send, rows = (
                [send[0] - less, *send[1:]],
                torch.cat([rows, rows[:1]])[: len(rows) - less],
            )
        return move(self, rows, send, receive, operation)

    ExpertGroup.all_to_all = faulty  # type: ignore[method-assign]
    assert route is not None


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mismatch_is_reported_on_all_ranks(fault: str) -> None:
    told = run_ranks(2, run_with_fault, fault)
    assert FAULTS[fault] in told[0], told
    assert fault == "late" or told[0] == told[1], told
    assert "rank 1" in told[0]


def test_the_check_does_not_change_a_correct_run() -> None:
    plain = run_ranks(2, trace, tiny("moe.capacity.factor=1.25"), 2)
    watched = run_ranks(2, trace, tiny("moe.capacity.factor=1.25", "debug.collectives=true"), 2)
    assert plain[0].losses == watched[0].losses
