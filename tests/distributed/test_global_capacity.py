"""`capacity.group: global` drops the same assignments on any number of ranks.

W=1, V=4        W=2, V=2              W=4, V=1
[0 1 2 3]       [0 1] [2 3]           [0] [1] [2] [3]        tokens of four virtual ranks
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from dmoe import MoE
from dmoe.config.schema import BalanceConfig, CapacityConfig
from dmoe.distributed.expert_parallel import shard_experts
from dmoe.distributed.mesh import ParallelMesh, build_mesh
from dmoe.moe.interfaces import NoComm
from dmoe.moe.routing import TokenContext
from tests.distributed.runs import trace
from tests.distributed.test_equality import compare
from tests.ranks import run_ranks
from tests.tiny import tiny

pytestmark = pytest.mark.ranks

GROUPS, SEQUENCES, LENGTH, DIM = 4, 8, 6, 8
Case = tuple[str, str, str, bool]
CASES: list[Case] = list(
    product(["position", "score"], ["drop", "next_choice"], ["packed", "padded"], [False, True])
)
"""Priority, overflow, exchange, padding (all of virtual rank 0, part of the others)."""
COMPARED = (
    "experts",
    "kept",
    "weights",
    "y",
    "x_gradient",
    "router_gradient",
    "switch",
    "importance",
)
EXACT = ("experts", "kept", "kept_by_expert")


def all_cases(rank: int, world: int, virtual: int) -> dict[Case, dict[str, np.ndarray]]:
    """Run every case in one set of processes, since starting them is slow."""
    mesh = build_mesh(ep=world, device=torch.device("cpu"))
    return {case: one_case(case, mesh, virtual) for case in CASES}


def one_case(case: Case, mesh: ParallelMesh, virtual: int) -> dict[str, np.ndarray]:
    priority, overflow, exchange, padding = case
    limits = CapacityConfig(factor=0.8, group="global", priority=priority, overflow=overflow)  # type: ignore[arg-type]
    balance = BalanceConfig(importance=1.0, switch_level="global")
    layer = MoE(
        DIM, 4, 8, 2, capacity=limits, balance=balance, exchange=exchange, virtual_ranks=virtual
    ).double()
    layer.initialize(3, std=0.6)
    shard_experts(layer, mesh)

    generator = torch.Generator().manual_seed(1)
    x_BSD = torch.randn(SEQUENCES, LENGTH, DIM, generator=generator, dtype=torch.float64)
    x_BSD[..., 0] += 1.0  # so that some experts are everybody's favourites, and something overflows
    valid_BS = torch.rand(SEQUENCES, LENGTH, generator=generator) > 0.2
    valid_BS[: SEQUENCES // GROUPS] = False
    here = slice(
        mesh.rank * SEQUENCES // mesh.world_size,
        (mesh.rank + 1) * SEQUENCES // mesh.world_size,
    )
    x = x_BSD[here].clone().requires_grad_()
    output = layer(x, TokenContext(valid_T=valid_BS[here].flatten() if padding else None))
    (output.y.square().sum() + sum(output.aux.values())).backward()

    assert x.grad is not None
    assert layer.router.weight.grad is not None
    peers = layer.comm if mesh.world_size > 1 else NoComm()
    values = {
        "experts": output.plan.expert_TK,
        "kept": output.plan.keep_TK,
        "weights": output.plan.weight_TK,
        "y": output.y,
        "x_gradient": x.grad,
        "router_gradient": peers.sum(layer.router.weight.grad),
        "kept_by_expert": peers.sum(output.stats.kept_E),
        "choices": peers.sum(output.stats.choice_E).sum(),
        "slots": peers.sum(output.stats.as_vector()[-1]),
        **{name: peers.sum(loss) for name, loss in output.aux.items()},
    }
    return {name: value.detach().numpy() for name, value in values.items() if value is not None}


Results = dict[int, dict[Case, dict[str, np.ndarray]]]
OF_TOKENS = ("experts", "kept", "weights", "y", "x_gradient")


@pytest.fixture(scope="module")
def results() -> Results:
    """Collect, per world size, the ranks' tokens in order, and sums over the ranks once."""
    joined: Results = {}
    for world in (1, 2, 4):
        ranks = run_ranks(world, all_cases, GROUPS // world)
        joined[world] = {
            case: {
                name: np.concatenate([rank[case][name] for rank in ranks])
                if name in OF_TOKENS
                else ranks[0][case][name]
                for name in ranks[0][case]
            }
            for case in CASES
        }
    return joined


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_assignments_on_one_two_and_four_ranks(results: Results, case: Case) -> None:
    alone = results[1][case]
    assert 0 < alone["kept"].sum() < alone["choices"], (
        "nothing was dropped: the test would prove less than it says"
    )
    for world in (2, 4):
        ranks = results[world][case]
        for name in EXACT:
            np.testing.assert_array_equal(
                ranks[name], alone[name], err_msg=f"{name} at world {world}"
            )
        for name in (*COMPARED, "slots"):
            np.testing.assert_allclose(
                ranks[name], alone[name], rtol=1e-10, atol=1e-12, err_msg=f"{name} at world {world}"
            )


@pytest.mark.parametrize("priority", ["position", "score"])
def test_next_choice_keeps_what_drop_keeps_and_more(results: Results, priority: str) -> None:
    for exchange in ("packed", "padded"):
        drop, again = (
            results[4][priority, overflow, exchange, False] for overflow in ("drop", "next_choice")
        )
        assert (again["kept"] | ~drop["kept"]).all()
        assert again["kept"].sum() > drop["kept"].sum()
        assert (again["experts"] != drop["experts"]).sum() == again["kept"].sum() - drop[
            "kept"
        ].sum()


@pytest.mark.parametrize("priority", ["position", "score"])
@pytest.mark.parametrize("overflow", ["drop", "next_choice"])
def test_exchanges_agree(results: Results, priority: str, overflow: str) -> None:
    packed, padded = (
        results[4][priority, overflow, exchange, True] for exchange in ("packed", "padded")
    )
    for name in packed:
        np.testing.assert_allclose(padded[name], packed[name], rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(
    "settings",
    [
        ["moe.capacity.overflow=next_choice", "moe.exchange=padded"],
        [
            "moe.capacity.priority=score",
            "moe.capacity.renormalize=true",
            "train.global_batch=16",
            "train.micro_batch=2",
        ],
    ],
    ids=["position next_choice padded", "score renormalize accumulated"],
)
def test_training_is_the_same(settings: list[str]) -> None:
    settings = ["moe.capacity.factor=1.0", "moe.capacity.group=global", *settings]
    [alone] = run_ranks(1, trace, tiny(*settings, "parallel.virtual_ranks=4"), 3, torch.float64)
    assert sum(alone.kept[0]) < sum(alone.choices[0])
    for world, virtual in ((2, 2), (4, 1)):
        ranks = run_ranks(
            world, trace, tiny(*settings, f"parallel.virtual_ranks={virtual}"), 3, torch.float64
        )
        compare(alone, ranks[-1], 1e-10)
