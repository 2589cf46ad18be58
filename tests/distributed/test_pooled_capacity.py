"""Pooled slots over ranks: drops and numbers of one process, pools within and across ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dmoe.config.schema import CapacityConfig, ExpertsConfig
from dmoe.distributed.expert_parallel import shard_experts
from dmoe.distributed.mesh import build_mesh
from dmoe.moe.layer import MoE
from dmoe.verify.verify import verify
from tests.distributed.test_costs import costs
from tests.distributed.test_heterogeneous_experts import lines
from tests.ranks import run_ranks
from tests.tiny import tiny

pytestmark = pytest.mark.ranks

GROUPS, EXPERTS = 4, 8
LIMITS: dict[str, dict[str, Any]] = {
    "pools of a rank": {"pool": 2},
    "one pool": {"pool": 8, "group": "sequence", "pool_floor": 0.0},
    "global": {
        **{"pool": 4, "pool_floor": 0.3, "group": "global"},
        **{"priority": "score", "overflow": "next_choice"},
    },
    "global by position": {"pool": 4, "group": "global", "overflow": "next_choice"},
    "another placement": {"pool": 2, "pool_floor": 0.5},
}
SHAPES = [[4], [], [9], [4], [4], [2, 2], [4], []]
"""Experts of unequal cost, placed out of order and unequally many per rank."""

Found = dict[str, list[np.ndarray]]


def outputs(rank: int, world: int, eps: list[int]) -> dict[tuple[str, int, str], list[np.ndarray]]:
    """Return keep, experts, y, gradient of x, and the experts' gradients, of every case."""
    return {
        (name, ep, exchange): one(rank, world, name, ep, exchange)
        for name in LIMITS
        for ep in eps
        for exchange in ("packed", "padded")
    }


def one(rank: int, world: int, name: str, ep: int, exchange: str) -> list[np.ndarray]:
    experts = ExpertsConfig(shapes=SHAPES) if "placement" in name else ExpertsConfig()
    layer = MoE(
        5, 4, EXPERTS, 3, exchange=exchange, virtual_ranks=GROUPS // world, experts=experts,
        capacity=CapacityConfig(factor=0.9, **LIMITS[name]),
    ).double()  # fmt: skip
    shard_experts(layer, build_mesh(ep, torch.device("cpu")))
    layer.initialize(0, std=0.6, out_std=0.8)
    generator = torch.Generator().manual_seed(3)
    x_BSD = torch.randn(GROUPS, 14, 5, dtype=torch.float64, generator=generator) + 0.7
    x_BSD = x_BSD.chunk(world)[rank].clone().requires_grad_()
    output = layer(x_BSD)
    output.y.sin().sum().backward()
    keep_TK, x_grad = output.plan.keep_TK, x_BSD.grad
    assert keep_TK is not None
    assert x_grad is not None
    grads = {n: p.grad for n, p in layer.experts.named_parameters() if p.grad is not None}
    square = sum(float(grad.square().sum()) for grad in grads.values()) * ep / world
    parts = [keep_TK, output.plan.expert_TK, output.y.detach(), x_grad, output.stats.as_vector()]
    return [part.numpy() for part in parts] + [np.array(square)]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process(world: int) -> None:
    """At EP 1, 2 and 4, packed and padded: the set of drops exactly, all numbers to 1e-12."""
    eps = [ep for ep in (1, 2, 4) if ep <= world]
    alone, ranks = run_ranks(1, outputs, [1])[0], run_ranks(world, outputs, eps)
    for name, ep, exchange in ranks[0]:
        expected = alone[name, 1, "packed"]
        found = [rank[name, ep, exchange] for rank in ranks]
        case = f"{name}, EP {ep}, {exchange}"
        assert 0 < expected[0].sum() < expected[0].size, "nothing is dropped"
        for part in range(2):
            joined = np.concatenate([rank[part] for rank in found])
            assert np.array_equal(joined, expected[part]), case
        for part in (2, 3):
            joined = np.concatenate([rank[part] for rank in found])
            np.testing.assert_allclose(joined, expected[part], rtol=1e-12, atol=1e-12, err_msg=case)
        stats = sum(rank[4] for rank in found)
        np.testing.assert_allclose(stats, expected[4], rtol=1e-12, err_msg=case)
        if ep == world:  # elsewhere the copies' gradients are not summed yet
            square = sum(rank[5] for rank in found)
            np.testing.assert_allclose(square, expected[5], rtol=1e-12, err_msg=case)


@pytest.mark.parametrize(
    ("group", "expected"), [("rank", [(2, 0), (2, 0)]), ("global", [(4, 0), (2, 0)])]
)
def test_pooled_slots_are_padded_without_a_host_read(group: str, expected: list[Any]) -> None:
    """The counts ride along; a shared capacity has one all-gather for either queue."""
    options = {"group": group, "pool": 4}
    for rank in run_ranks(2, costs, "padded", 1.25, "micro_batch", options):
        assert rank == expected


def test_verify_compares_pools() -> None:
    """A pool that spans the ranks of EP 2: ddp and fsdp, two steps, checkpoints."""
    settings = ["moe.capacity.factor=1.0", "moe.capacity.pool=8", "moe.capacity.pool_floor=0.5"]
    report = verify(tiny(*settings, "model.layers=1"), worlds=[1, 2])
    assert report.ok, lines(report)
    assert any("padded" in case for case in report.cases)
