"""What the options of the exchange cost, what runs beside what, and what is refused."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import dmoe
from dmoe.config.errors import ConfigError
from dmoe.config.schema import CapacityConfig, ExchangeConfig
from dmoe.distributed.all_to_all import ExpertGroup
from dmoe.distributed.exchange import overlap
from dmoe.distributed.expert_parallel import shard_experts
from dmoe.distributed.mesh import build_mesh
from dmoe.moe.experts import FeedForward, one_by_one
from dmoe.moe.layer import MoE
from tests.distributed.test_costs import costs
from tests.distributed.test_exchange_options import DIM, EXPERTS, layer_of
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks


def sizes(rank: int, world: int, settings: dict[str, Any]) -> list[int]:
    """Return the bytes of one forward and backward, and the choices and tokens for other ranks."""
    layer = layer_of(dtype=torch.float32)
    shard_experts(
        layer, build_mesh(world, torch.device("cpu")), exchange=ExchangeConfig(**settings)
    )
    x = torch.randn(2, 24, DIM, generator=torch.Generator().manual_seed(rank))
    timer: Any = layer.packed.expert_group.timer  # type: ignore[attr-defined]
    timer.start(time.perf_counter)
    out = layer(x.requires_grad_())
    rank_TK = out.plan.expert_TK // (EXPERTS // world)
    out.y.sum().backward()
    choices = int((rank_TK != rank).sum())
    tokens = sum(int((rank_TK == other).any(1).sum()) for other in range(world) if other != rank)
    return [timer.sent_bytes, choices, tokens]


@pytest.mark.parametrize(("wire", "itemsize"), [("full", 4), ("bf16", 2)])
def test_bytes_are_the_fewest_of_each_option(wire: str, itemsize: int) -> None:
    """Rows of choices, or of tokens and their 4 choices; counts besides."""
    size, counts = DIM * itemsize, 4 * 3 * 2 * 8
    options = {"wire": wire, "chunks": 1 if wire == "full" else 2}
    sent, choices, _ = np.sum(run_ranks(4, sizes, options), 0)
    assert sent == 4 * choices * size + counts
    message = size + 4 * (4 + 1)
    message += -message % 8
    options = {"wire": wire, "once_per_rank": True}
    sent, choices, tokens = np.sum(run_ranks(4, sizes, options), 0)
    assert tokens < 0.8 * choices
    assert sent == 2 * tokens * (message + size) + counts


def events(rank: int, world: int, options: dict[str, Any]) -> list[str]:
    """Return what one forward and backward did, in order."""
    layer, seen = layer_of(shared=1), list[str]()
    config = ExchangeConfig(**options)
    shard_experts(layer, build_mesh(world, torch.device("cpu")), exchange=config)

    def noting(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(args[4] if name == "start" else name)
            return function(*args, **kwargs)

        return call

    x = torch.randn(2, 24, DIM, dtype=torch.float64).requires_grad_()
    ExpertGroup.start = noting("start", ExpertGroup.start)  # type: ignore[method-assign]
    exchange: Any = overlap.RowExchange
    exchange.wait = noting("wait", exchange.wait)
    one_by_one.weight_grad = noting("weight gradient", one_by_one.weight_grad)
    one_by_one.activate = noting("experts", one_by_one.activate)
    for name in ("hidden", "output"):
        setattr(FeedForward, name, noting(f"shared {name}", getattr(FeedForward, name)))
    assert layer.shared is not None
    for part in ("w_in", "w_out"):
        weight = getattr(layer.shared, part).weight
        weight.register_hook(lambda grad, part=part: seen.append(f"shared {part} gradient"))
    layer(x).y.sum().backward()
    return [name for n, name in enumerate(seen) if seen[n - 1 : n] != [name]]


def test_what_runs_while_rows_are_under_way() -> None:
    """Between start and wait: shared experts in both directions, weight gradients in backward."""
    for seen in run_ranks(2, events, {"overlap": True}):
        assert seen == [
            *("counts", "dispatch", "shared hidden", "wait", "experts"),
            *("combine", "shared output", "wait"),
            *("combine backward", "shared w_out gradient", "wait"),
            *("dispatch backward", "weight gradient", "shared w_in gradient", "wait"),
        ]


def test_a_chunk_is_computed_while_others_are_under_way() -> None:
    """Forward and backward of two chunks: one is waited for once the other has departed."""
    for seen in run_ranks(2, events, {"chunks": 2}):
        assert [name for name in seen if not name.startswith("shared")] == [
            *("counts", "dispatch 1 of 2", "dispatch 2 of 2"),
            *("wait", "experts", "combine 1 of 2", "wait", "experts", "combine 2 of 2", "wait"),
            *("combine 2 of 2 backward", "combine 1 of 2 backward"),
            *("wait", "weight gradient", "dispatch 2 of 2 backward"),
            *("wait", "weight gradient", "dispatch 1 of 2 backward", "wait"),
        ]
    for seen in run_ranks(2, events, {"chunks": 2, "overlap": True}):
        assert [name for name in seen if not name.startswith("shared")][-9:] == [
            *("combine 2 of 2 backward", "combine 1 of 2 backward"),
            *("wait", "dispatch 2 of 2 backward", "weight gradient"),
            *("wait", "dispatch 1 of 2 backward", "weight gradient", "wait"),
        ]


@pytest.mark.parametrize(
    ("option", "exchange", "expected"),
    [
        ({"overlap": True}, "packed", [(3, 1), (2, 0)]),
        ({"overlap": True}, "padded", [(2, 0), (2, 0)]),
        ({"once_per_rank": True}, "packed", [(3, 1), (2, 0)]),
        ({"chunks": 4}, "packed", [(9, 1), (8, 0)]),
        ({"chunks": 2}, "padded", [(4, 0), (4, 0)]),
        ({"levels": 2}, "packed", [(6, 1), (4, 0)]),
        ({"levels": 2}, "padded", [(4, 0), (4, 0)]),
    ],
)
def test_collectives_and_host_reads(
    option: dict[str, Any], exchange: str, expected: list[Any]
) -> None:
    """Those of the plain exchange (`test_costs.py`); of chunks, more collectives alone."""
    factor = 1.25 if exchange == "padded" else None
    config = ExchangeConfig(**option)
    for rank in run_ranks(2 * config.levels, costs, exchange, factor, "micro_batch", None, config):
        assert rank == expected


def between_nodes(rank: int, world: int) -> list[list[int]]:
    """Return messages and bytes to the other node of 2 ranks, with one level and with two."""
    mesh, everything = build_mesh(world, torch.device("cpu"), node_size=2), list[list[int]]()
    exchange = dist.all_to_all_single
    for levels in (1, 2):
        layer, found = layer_of(), [0, 0]
        shard_experts(layer, mesh, exchange=ExchangeConfig(levels=levels))

        def counting(
            received: Any, rows: Any, recv: Any, send: Any, found: Any = found, *, group: Any
        ) -> None:
            ranks = dist.get_process_group_ranks(group)
            sizes = send or [len(rows) // len(ranks)] * len(ranks)
            for other, size in zip(ranks, sizes, strict=True):
                if other // 2 != rank // 2:
                    found[0] += 1
                    found[1] += size * rows[0].nbytes
            exchange(received, rows, recv, send, group=group)

        dist.all_to_all_single = counting
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn(2, 24, DIM, dtype=torch.float64, generator=generator)
        layer(x.requires_grad_()).y.sum().backward()
        everything.append(found)
    return everything


def test_two_levels_send_fewer_messages_between_nodes_and_the_same_bytes() -> None:
    """One per other node and exchange (counts; rows there and back, twice), not one per rank."""
    ranks = np.array(run_ranks(4, between_nodes))
    assert (ranks[:, 0, 0] == 5 * 2).all()
    assert (ranks[:, 1, 0] == 5 * 1).all()
    assert ranks[:, 0, 1].sum() == ranks[:, 1, 1].sum()


def with_a_hook(rank: int, world: int) -> str:
    """Use the experts' rows once more, so that their gradient is not the one that was sent."""
    layer = layer_of()
    shard_experts(layer, build_mesh(world, torch.device("cpu")), exchange=ExchangeConfig(True))
    others = list[Tensor]()
    layer.experts.register_forward_pre_hook(lambda _, inputs: others.append(inputs[0].sum()))
    y = layer(torch.randn(2, 24, DIM, dtype=torch.float64).requires_grad_()).y
    with pytest.raises(RuntimeError) as error:
        (y.sum() + others[0]).backward()
    return str(error.value)


def test_another_use_of_the_rows_is_an_error() -> None:
    for said in run_ranks(2, with_a_hook):
        assert "set parallel.exchange.overlap=false" in said


def refusals(rank: int, world: int) -> list[str]:
    found = []
    for capacity, copies, option in (
        (CapacityConfig(factor=1.0, pool=2), 0, {"overlap": True}),
        (CapacityConfig(), 2, {"overlap": True}),
        (CapacityConfig(factor=1.0), 0, {"once_per_rank": True}),
        (CapacityConfig(), 0, {"once_per_rank": True, "overlap": True}),
        (CapacityConfig(factor=1.0, pool=2), 0, {"wire": "bf16"}),
        (CapacityConfig(), 0, {"wire": "bf16"}),
        (CapacityConfig(), 2, {"chunks": 2}),
        (CapacityConfig(), 0, {"chunks": 3}),
        (CapacityConfig(), 0, {"levels": 2}),
    ):
        exchange = "padded" if capacity.factor else "packed"
        layer = MoE(8, 8, 4, 2, capacity=capacity, exchange=exchange)
        if option == {"wire": "bf16"} and exchange == "packed":
            layer = layer.bfloat16()
        with pytest.raises(ConfigError) as error:
            dmoe.parallelize(layer, ep=2, copies=copies, exchange=ExchangeConfig(**option))
        found.append(str(error.value))
    os.environ["LOCAL_WORLD_SIZE"] = str(1 + rank)
    with pytest.raises(ConfigError) as error:
        dmoe.parallelize(MoE(8, 8, 4, 2), ep=2, exchange=ExchangeConfig(levels=2))
    return [*found, str(error.value)]


def test_refusals() -> None:
    """Those of a config are in tests/config/refusals.py."""
    said = run_ranks(2, refusals)[0]
    assert "exchange.overlap=True: does not work with pooled slots" in said[0]
    assert "exchange.overlap=True: does not work with copies for the step" in said[1]
    assert "exchange.once_per_rank=True: needs the packed exchange" in said[2]
    assert "exchange.once_per_rank=True: works with neither overlap nor chunks" in said[3]
    assert "exchange.wire=bf16: does not work with pooled slots" in said[4]
    assert "exchange.wire=bf16: saves nothing where rows are bfloat16 already" in said[5]
    assert "exchange.chunks=2: does not work with copies for the step" in said[6]
    assert "exchange.chunks=3: must divide the 2 experts of each of 2 ranks; use one of" in said[7]
    assert "exchange.levels=2: needs an EP group of several whole nodes of 2 ranks" in said[8]
    assert "exchange.levels=2: needs as many ranks on each node, and there are 1 to 2" in said[9]
