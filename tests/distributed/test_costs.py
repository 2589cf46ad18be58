"""Costs of an MoE layer: number of collectives and host reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dmoe.bench.measure import saved_bytes
from dmoe.config.schema import BalanceConfig, CapacityConfig, ExchangeConfig
from dmoe.distributed.expert_parallel import shard_experts
from dmoe.distributed.mesh import build_mesh
from dmoe.moe.chunks import RowChunks
from dmoe.moe.interfaces import TokensPerExpert
from dmoe.moe.layer import MoE
from tests.ranks import run_ranks

COLLECTIVES = (
    "all_to_all_single",
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "broadcast",
    "reduce_scatter_tensor",
)
READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero")


class CountingExperts(nn.Module):
    """Experts without host reads: the real ones loop over counts on the CPU, not on CUDA."""

    sends_gradient = takes_tokens = False
    takes_chunks = True

    def __init__(self, experts: nn.Module, takes_order: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.num_experts, self.takes_order = experts.num_experts, takes_order

    def forward(self, rows_RD: Any, per_expert: TokensPerExpert | RowChunks, **order: Any) -> Any:
        if isinstance(per_expert, RowChunks):
            experts = len(per_expert.chunks) * per_expert.per_chunk
            stacks = {"weight": self.weight.expand(experts)}
            return per_expert.compute(
                lambda _, weights, rows, count: rows * weights["weight"][0], stacks, rows_RD
            )
        return rows_RD * self.weight


def counted(counter: Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        counter[name] += 1
        return function(*args, **kwargs)

    return call


def costs(
    rank: int,
    world: int,
    exchange: str,
    factor: float | None,
    level: str,
    limits: dict[str, Any] | None = None,
    options: ExchangeConfig | None = None,
    takes_order: bool = False,
) -> list[tuple[int, int]]:
    """Count (collectives, host reads) of one layer's forward and of its backward."""
    torch.manual_seed(rank)
    layer = MoE(
        16,
        8,
        8,
        2,
        exchange=exchange,
        capacity=CapacityConfig(factor=factor, **limits or {}),
        balance=BalanceConfig(switch_level=level),
    )
    levels = 1 if options is None else options.levels
    mesh = build_mesh(world, torch.device("cpu"), node_size=None if levels == 1 else world // 2)
    shard_experts(layer, mesh, exchange=options)
    layer.experts = CountingExperts(layer.experts, takes_order)
    x = torch.randn(2, 24, 16, requires_grad=True)
    layer(x).y.sum().backward()  # first-time reads of gloo and autograd do not count
    made, read = Counter[str](), Counter[str]()
    for name in COLLECTIVES:
        setattr(dist, name, counted(made, name, getattr(dist, name)))
    for name in READS:
        setattr(torch.Tensor, name, counted(read, name, getattr(torch.Tensor, name)))
    output = layer(x)
    forward = (made.total(), read.total())
    loss = output.y.sum() + output.aux["switch"] + output.aux["z"]
    made.clear(), read.clear()
    loss.backward()
    return [forward, (made.total(), read.total())]


@pytest.mark.parametrize("takes_order", [False, True])
@pytest.mark.parametrize(
    ("exchange", "factor", "level", "expected"),
    [
        ("packed", None, "micro_batch", [(3, 1), (2, 0)]),
        ("packed", 1.25, "sequence", [(3, 1), (2, 0)]),
        ("padded", 1.25, "micro_batch", [(2, 0), (2, 0)]),
        ("padded", 1.25, "global", [(3, 0), (2, 0)]),
    ],
)
def test_collectives_and_host_reads_of_a_layer(
    exchange: str, factor: float | None, level: str, expected: list[Any], takes_order: bool
) -> None:
    """Packed: 3 + 2, one host read; padded: 2 + 2, none; global balance: 1 all-reduce more."""
    for rank in run_ranks(2, costs, exchange, factor, level, None, None, takes_order):
        assert rank == expected


def test_saved_bytes_of_a_layer_on_one_process() -> None:
    """Tokens, hidden rows, and what routing keeps: neither rows nor outputs of experts."""
    tokens, dim, hidden, experts, top_k = 512, 32, 16, 8, 4
    layer = MoE(dim, hidden, experts, top_k)
    x = torch.randn(1, tokens, dim, requires_grad=True)
    saved = saved_bytes(lambda: layer(x)) / tokens
    # logits, scores and the order of the experts; weights, before and after they are renormalized
    routing = experts * (4 + 4 + 8) + top_k * (4 + 4) + 3 * 4
    needed = 4 * (dim + 2 * hidden * top_k)
    assert needed <= saved <= needed + routing


def padded_on_meta(
    rank: int, world: int, pretended: int, options: dict[str, Any]
) -> dict[str, tuple[int, ...]]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=pretended)
    with torch.device("meta"):
        layer = MoE(64, 32, 64, 4, exchange="padded", **options)
        shard_experts(layer, build_mesh(64, torch.device("meta")))
        x = torch.randn(2, 128, 64, requires_grad=True)
        output = layer(x)
        (output.y.sum() + output.aux["switch"] + output.aux["z"]).backward()
    dist.destroy_process_group()
    return {
        "y": tuple(output.y.shape),
        "x": tuple(x.grad.shape),
        "w_in": tuple(layer.experts.w_in.grad.shape),
        "router": tuple(layer.router.weight.grad.shape),
    }


@pytest.mark.parametrize("pretended", [64, 1024])
@pytest.mark.parametrize(
    "options",
    [
        {"capacity": CapacityConfig(factor=1.25)},
        {
            "capacity": CapacityConfig(
                factor=1.0,
                group="sequence",
                priority="score",
                overflow="next_choice",
                renormalize=True,
            )
        },
        {
            "capacity": CapacityConfig(factor=1.0, group="global"),
            "balance": BalanceConfig(switch_level="global", importance=0.1),
        },
    ],
    ids=["rank", "sequence", "global"],
)
def test_the_padded_layer_reads_no_value(pretended: int, options: dict[str, Any]) -> None:
    """The meta device has no values: any host read in forward or backward would raise."""
    shapes = run_ranks(1, padded_on_meta, pretended, options)[0]
    assert shapes == {"y": (2, 128, 64), "x": (2, 128, 64), "w_in": (1, 64, 64), "router": (64, 64)}
