"""What one rank's padding and dropped rows hold reaches no other rank; masks are on all or none.

The story: `0 x NaN` is NaN, so NaN in the padding of one rank made gradients NaN on all. A collate
function that made a mask only where there is padding left the ranks waiting for each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dmoe import MoE
from dmoe.config.errors import ConfigError
from dmoe.config.schema import BalanceConfig, CapacityConfig
from dmoe.distributed.expert_parallel import shard_experts
from dmoe.distributed.mesh import ParallelMesh, build_mesh
from dmoe.moe.routing import TokenContext
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks

EXCHANGES = ("packed", "padded")
CLEAN, *POISON = (0.5, math.nan, math.inf, 65504.0)
Result = dict[str, np.ndarray]


def sharded(mesh: ParallelMesh, exchange: str, factor: float, balance: BalanceConfig) -> MoE:
    limits = CapacityConfig(factor=factor)
    layer = MoE(8, 4, 4, 2, capacity=limits, balance=balance, exchange=exchange).double()
    layer.initialize(3, std=0.6)
    shard_experts(layer, mesh)
    return layer


def tokens(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)


def results(layer: MoE, x: Tensor, out: Tensor) -> Result:
    assert x.grad is not None
    grads = {name: p.grad.numpy() for name, p in layer.named_parameters() if p.grad is not None}
    return grads | {"y": out.detach().numpy(), "x": x.grad.numpy()}


def with_padding(mesh: ParallelMesh, exchange: str, value: float) -> Result:
    """Rank 0 has padding that holds `value`, a whole sequence of it, and a gradient like that."""
    balance = BalanceConfig(switch_level="sequence", importance=0.1)
    layer = sharded(mesh, exchange, 0.7, balance)
    x, valid_BS = tokens(mesh.rank), torch.ones(3, 5, dtype=torch.bool)
    if mesh.rank == 0:
        valid_BS[0, 3:] = valid_BS[1] = False
    x[~valid_BS] = value
    out = layer(x.requires_grad_(), TokenContext(valid_T=valid_BS))
    grad_y = torch.ones_like(out.y).masked_fill(~valid_BS.unsqueeze(-1), value)
    aux = list(out.aux.values())
    torch.autograd.backward([out.y, *aux], [grad_y, *(torch.ones_like(a) for a in aux)])
    switch = out.aux["switch"].detach().clone()
    dist.all_reduce(switch)
    return results(layer, x, out.y) | {"switch": switch.numpy()}


def with_dropped_rows(mesh: ParallelMesh, exchange: str, value: float) -> Result:
    """All tokens select experts 0 and 1, so the last of rank 1 are dropped; they hold `value`."""
    layer = sharded(mesh, exchange, 0.5, BalanceConfig(switch=0.0))
    layer.router.get_buffer("bias_E")[:2] = 1e6
    x = tokens(mesh.rank)
    if mesh.rank == 1:
        x[2, 1:] = value
    out = layer(x.requires_grad_())
    assert not out.plan.is_kept_TK[11:].any()
    assert not out.y[2, 1:].any()
    out.y.sum().backward()
    return results(layer, x, out.y)


CASES = list(product((with_padding, with_dropped_rows), EXCHANGES))


def mask_errors(mesh: ParallelMesh) -> list[str]:
    """Return the errors of masks on one rank only, and of a rank that later changes."""
    errors = []
    mask = TokenContext(valid_T=torch.ones(3, 5, dtype=torch.bool))
    steps: list[Callable[[MoE], object]] = [
        lambda layer: layer(tokens(0), mask if mesh.rank == 0 else TokenContext()),
        lambda layer: [layer(tokens(0), mask), layer(tokens(0), mask), layer(tokens(0))],
        lambda layer: [layer(tokens(0)), layer(tokens(0), mask)],
    ]
    for step in steps:
        try:
            step(sharded(mesh, "packed", 0.7, BalanceConfig()))
        except ConfigError as error:
            errors.append(str(error))
    layer = sharded(mesh, "packed", 0.7, BalanceConfig())
    layer(tokens(0), mask)
    layer.eval()(tokens(0))  # an evaluation may do without
    return errors


def everything(rank: int, world: int) -> tuple[dict[tuple[str, str, str], Result], list[str]]:
    mesh = build_mesh(ep=world, device=torch.device("cpu"))
    found = {
        (case.__name__, exchange, str(value)): case(mesh, exchange, value)
        for case, exchange in CASES
        for value in (CLEAN, *POISON)
    }
    return found, mask_errors(mesh)


@pytest.fixture(scope="module")
def ranks() -> list[tuple[dict[tuple[str, str, str], Result], list[str]]]:
    """Start two ranks once for all tests: 6 seconds."""
    return run_ranks(2, everything)


@pytest.mark.parametrize(("case", "exchange"), CASES)
@pytest.mark.parametrize("value", POISON)
def test_it_reaches_no_other(
    case: Callable[..., Result], exchange: str, value: float, ranks: list[tuple]
) -> None:
    """Equal bits to the run that holds 0.5 there, forward and backward, on both ranks."""
    for found, _ in ranks:
        clean, got = (found[case.__name__, exchange, str(one)] for one in (CLEAN, value))
        assert clean.keys() == got.keys()
        assert "router.weight" in clean
        for name, expected in clean.items():
            assert np.isfinite(expected).all(), name
            assert np.array_equal(got[name], expected), name


def test_masks_on_some_ranks_or_in_some_steps_are_an_error(ranks: list[tuple]) -> None:
    """They waited for each other, or one took the numbers of another."""
    for rank, (_, errors) in enumerate(ranks):
        given = ("bool[15]", "NoneType")[rank]
        assert errors[0].startswith(f"valid_T={given}: 1 of 2 ranks have passed a mask")
        assert errors[1].startswith("valid_T=NoneType: a mask was passed in the first step")
        assert errors[2].startswith("valid_T=bool[15]: a mask was not passed in the first step")
        assert len(errors) == 3
