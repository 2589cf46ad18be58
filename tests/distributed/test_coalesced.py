"""Many tensors in one collective are those of one collective per tensor."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dmoe.distributed import coalesced
from dmoe.distributed.expert_parallel import ExpertLocation
from dmoe.distributed.mesh import build_mesh
from tests.distributed.test_costs import counted
from tests.ranks import run_ranks

SHAPES = {
    "even": ((6, 4), 0),
    "last shard smaller": ((5, 3), 0),
    "last shard empty": ((1, 7), 0),
    "no numbers": ((0, 3), 0),
    "second dimension": ((2, 5, 3), 1),
    "one number": ((1,), 0),
}


def full(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def gathered_shards(rank: int, world: int, bucket: int) -> tuple[list[str], int, int]:
    """Return the tensors that differ from torch's, and the all-gathers of both."""
    coalesced.BUCKET_BYTES = bucket
    mesh = init_device_mesh("cpu", (world,))
    values: dict[str, Tensor] = {"on every rank": torch.ones(3)}
    for dtype in (torch.float32, torch.bfloat16):
        for name, (shape, dim) in SHAPES.items():
            whole = full(shape, dtype).requires_grad_()
            values[f"{name} {dtype}"] = distribute_tensor(whole, mesh, [Shard(dim)])
        values[f"replicated {dtype}"] = distribute_tensor(full((2, 2), dtype), mesh, [Replicate()])
    made = Counter[str]()
    dist.all_gather = counted(made, "all_gather", dist.all_gather)
    found = coalesced.unsharded(values)
    assert list(found) == list(values)
    different = []
    for name, value in values.items():
        expected = value.full_tensor() if isinstance(value, DTensor) else value
        got = found[name]
        if not (torch.equal(got, expected) and got.dtype == expected.dtype):
            different.append(name)
        assert not got.requires_grad
    return different, made.total(), len(values)


@pytest.mark.parametrize(("bucket", "collectives"), [(1 << 20, 2), (64, 8)])
def test_shards_are_put_together_as_by_torch(bucket: int, collectives: int) -> None:
    """A state of hundreds of tensors took one collective each, a quarter of the time of verify."""
    for different, made, tensors in run_ranks(3, gathered_shards, bucket):
        assert not different
        assert made == collectives < tensors


def over_experts(rank: int, world: int) -> tuple[dict[str, Any], dict[str, Any], int]:
    mesh = build_mesh(world, torch.device("cpu"))
    stacks = {
        name: torch.full((2, width), float(10 * rank + width), dtype=dtype)
        for name, width, dtype in (("a", 1, torch.float32), ("b", 3, torch.float64), ("c", 2, None))
    }
    stacks["a"][1] += 0.5
    where = {
        str(n): ExpertLocation(n % world, (n + 1, 2), torch.float32, torch.device("cpu"))
        for n in range(5)
    }
    own = {n: torch.full(at.shape, float(n)) for n, at in where.items() if at.ep_rank == rank}
    made = Counter[str]()
    for name in ("all_gather", "broadcast"):
        setattr(dist, name, counted(made, name, getattr(dist, name)))
    whole = coalesced.gather_stacks(stacks, mesh)
    singles = coalesced.broadcast_experts(own | stacks, where, mesh)
    numbers = [{n: t.tolist() for n, t in found.items()} for found in (whole, singles)]
    return numbers[0], numbers[1], made.total()


def test_stacks_and_single_experts_come_from_their_ranks() -> None:
    for whole, singles, made in run_ranks(2, over_experts):
        assert whole["a"] == [[1.0], [1.5], [11.0], [11.5]]
        assert whole["b"] == [[3.0] * 3] * 2 + [[13.0] * 3] * 2
        assert whole["c"] == [[2.0] * 2] * 2 + [[12.0] * 2] * 2
        assert singles == {str(n): [[float(n)] * 2] * (n + 1) for n in range(5)}
        assert made == 2 + 2, "two dtypes of stacks, two ranks of single experts"
