"""Heterogeneous and zero-cost experts on several ranks: unequal numbers, checkpoints by id."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dmoe.checkpoint import save_load
from dmoe.cli.checkpoint.info import inspect_checkpoint
from dmoe.config.errors import ConfigError
from dmoe.config.rules import expert_parallel
from dmoe.config.schema import CapacityConfig, Config, ExpertsConfig, RouterConfig
from dmoe.data import open_data
from dmoe.distributed.expert_parallel import shard_experts
from dmoe.distributed.init import init_distributed
from dmoe.distributed.mesh import build_mesh
from dmoe.moe.layer import MoE
from dmoe.train import checkpointer
from dmoe.train.engine import Engine, build_engine
from dmoe.train.step import train_step, training_batches
from dmoe.verify.capture import state_arrays
from dmoe.verify.verify import Report, verify
from tests.distributed.test_costs import COLLECTIVES, CountingExperts, counted
from tests.ranks import run_ranks
from tests.tiny import tiny

MIXED = [
    "moe.experts.shapes=[[12],[],[24],[6,6]]",
    "moe.num_experts=4",
    "moe.top_k=4",
    "moe.router.renormalize=false",
]
BUDGET = [*MIXED, "moe.router.kind=budget", "moe.router.budget=0.6"]
FREE = ["moe.experts.zero=1", "moe.experts.copy=1", "moe.experts.constant=2"]
PADDED = ["moe.capacity.factor=1.0", "moe.exchange=padded"]
SHAPES = [[12], [], [24], [6, 6], [12]]


def lines(report: Report) -> str:
    return "\n".join(
        f"{row.quantity}: {row.where} {row.cause}" for row in report.rows if not row.ok
    )


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("overrides", "several"),
    [
        pytest.param(
            [*BUDGET, *FREE, *PADDED, "moe.balance.bias=0.01", "model.layers=1"],
            [1, 3],
            marks=pytest.mark.ranks,
        ),
        pytest.param(
            [*BUDGET, *FREE, *PADDED, "moe.balance.bias=0.01"], [3], marks=pytest.mark.slow
        ),
        pytest.param(
            [
                *MIXED[:2],
                "moe.capacity.factor=0.8",
                "moe.capacity.group=global",
                "moe.capacity.priority=score",
            ],
            [3],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [
                *BUDGET,
                "moe.router.per=sequence",
                "moe.router.allow_future_leak=true",
                "moe.experts.kind=relu",
            ],
            [3],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["one layer", "budget with free experts", "top_k over shapes", "per sequence"],
)
def test_one_process_equals_several_ranks(overrides: list[str], several: list[int]) -> None:
    """Loss, gradients, drops, two steps and checkpoints, in float64 to 1e-10."""
    report = verify(tiny(*overrides), worlds=several)
    assert report.ok, lines(report)
    assert any("3 ranks EP=3" in case for case in report.cases), report.refused


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_with_copies_and_fsdp() -> None:
    """Two replicas per expert: gradients summed under DDP, matrices sharded under FSDP2."""
    report = verify(tiny(*BUDGET, *FREE), worlds=[4])
    assert report.ok, lines(report)
    assert any("EP=2 packed fsdp" in case for case in report.cases)


def outputs(rank: int, world: int, exchange: str) -> list[np.ndarray]:
    """Return y, the gradient of x and the compute spent, for this rank's share of 12 tokens."""
    layer = MoE(
        6, 1, 5, 4, experts=ExpertsConfig(kind="gelu", shapes=SHAPES, copy=1, constant=1),
        router=RouterConfig(kind="budget", renormalize=False, budget=0.7, min_weight=0.05),
        capacity=CapacityConfig(factor=0.9), exchange=exchange,
    ).double()  # fmt: skip
    if world > 1:
        shard_experts(layer, build_mesh(world, torch.device("cpu")))
    layer.initialize(0, std=0.6, out_std=0.8)
    generator, found = torch.Generator().manual_seed(7), []
    for part in range(6):
        x = torch.randn(2, 6, dtype=torch.float64, generator=generator).requires_grad_()
        if part % world == rank:
            output = layer(x)
            output.y.sin().sum().backward()
            found += [
                output.y.detach().numpy(),
                x.grad.detach().numpy(),
                output.compute_usage.cost_T.numpy(),
            ]
    return found


@pytest.mark.parametrize("exchange", ["packed", "padded"])
@pytest.mark.parametrize("world", [2, 3])
def test_the_layer_alone(world: int, exchange: str) -> None:
    alone = run_ranks(1, outputs, exchange)[0]
    ranks = run_ranks(world, outputs, exchange)
    for part in range(6):
        mine = ranks[part % world][part // world * 3 : part // world * 3 + 3]
        for got, expected in zip(mine, alone[3 * part : 3 * part + 3], strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10)


def engine_of(config: Config) -> Engine:
    return build_engine(config, init_distributed("cpu"), 256, torch.float64)


def train_and_save(rank: int, world: int, config: Config, folder: Path) -> dict[str, Any]:
    engine = engine_of(config)
    data = open_data(config.data, config.train.seed)
    for step in range(2):
        train_step(engine, training_batches(data.train, engine, step), 0.01)
    save_load.save(folder, 1, checkpointer.train_state(engine), {}, group=engine.mesh.control_group)
    return state_arrays(engine)


def load_and_save(
    rank: int, world: int, config: Config, source: Path, folder: Path
) -> dict[str, Any]:
    engine = engine_of(config)
    checkpointer.load_training_state(engine, source / "step-00000001")
    save_load.save(folder, 1, checkpointer.train_state(engine), {}, group=engine.mesh.control_group)
    return state_arrays(engine)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_checkpoint_of_two_ranks_loads_on_one_and_three(tmp_path: Path, mode: str) -> None:
    """Weights, moments and step counts bit for bit; experts are found by their global id."""
    config = tiny(*BUDGET, *FREE, "train.global_batch=12", f"parallel.mode={mode}")
    written = run_ranks(2, train_and_save, config, tmp_path / "two")
    one = run_ranks(1, load_and_save, config, tmp_path / "two", tmp_path / "one")
    three = run_ranks(3, load_and_save, config, tmp_path / "one", tmp_path / "three")
    experts = {name for name in written[0] if ".experts." in name}
    assert len(experts) == 2 * 8 * 4, (
        "two layers of eight matrices: weight, two moments, a step count"
    )
    for other in [*written, *one, *three]:
        assert other.keys() == written[0].keys()
        for name, value in written[0].items():
            assert np.array_equal(value, other[name]), name
    assert any(
        value.any()
        for name, value in written[0].items()
        if name.startswith("exp_avg.") and ".experts." in name
    )
    found = inspect_checkpoint(tmp_path / "three" / "step-00000001")
    assert set(found.layers.values()) == {4}
    assert sorted(expert for shard in found.files for expert in shard.experts) == [0, 1, 2, 3], (
        "each on one rank alone"
    )


def costs(rank: int, world: int, exchange: str) -> list[int]:
    layer = MoE(
        16, 8, 3, 2, exchange=exchange, capacity=CapacityConfig(factor=1.25),
        experts=ExpertsConfig(shapes=[[8], [], [4, 4]], copy=1),
    )  # fmt: skip
    shard_experts(layer, build_mesh(world, torch.device("cpu")))
    layer.experts = CountingExperts(layer.experts, takes_order=False)
    x = torch.randn(2, 24, 16, requires_grad=True)
    layer(x).y.sum().backward()
    made = Counter[str]()
    for name in COLLECTIVES:
        setattr(dist, name, counted(made, name, getattr(dist, name)))
    output = layer(x)
    forward = made.total()
    output.y.sum().backward()
    return [forward, made.total() - forward]


@pytest.mark.parametrize(("exchange", "expected"), [("packed", [3, 2]), ("padded", [2, 2])])
def test_three_experts_on_two_ranks_add_no_collective(exchange: str, expected: list[int]) -> None:
    assert run_ranks(2, costs, exchange) == [expected] * 2


def padded_on_meta(rank: int, world: int) -> tuple[int, ...]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    with torch.device("meta"):
        layer = MoE(
            16, 8, 3, 3, exchange="padded", capacity=CapacityConfig(factor=1.25),
            router=RouterConfig(kind="budget", renormalize=False, budget=0.5),
            experts=ExpertsConfig(shapes=[[8], [], [4, 4]], copy=1, constant=2),
        )  # fmt: skip
        shard_experts(layer, build_mesh(2, torch.device("meta")))
        output = layer(torch.randn(2, 24, 16, requires_grad=True))
        (output.y.sum() + output.aux["switch"]).backward()
    dist.destroy_process_group()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    return tuple(output.y.shape)


def test_the_padded_layer_reads_no_value() -> None:
    """Placement and dispatch: on the meta device any host read would raise."""
    assert run_ranks(1, padded_on_meta) == [(2, 24, 16)]


def test_auto_leaves_no_rank_without_an_expert() -> None:
    mixed = tiny(*BUDGET)
    assert [expert_parallel(mixed, world) for world in (1, 2, 3, 4, 6, 8, 5)] == [
        1,
        2,
        3,
        4,
        3,
        4,
        1,
    ]
    assert expert_parallel(tiny(*BUDGET, "parallel.ep=3"), 6) == 3
    with pytest.raises(
        ConfigError,
        match=r"moe.num_experts=4: leaves some of the parallel.ep=8 ranks without an expert",
    ):
        expert_parallel(tiny(*BUDGET, "parallel.ep=8"), 8)
