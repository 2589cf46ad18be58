"""A world of ranks that are not there: torch's fake process group, and what a step would send.

Its collectives return at once and move nothing. So one process runs the step of one rank of any
world, on tensors without memory, and counts the bytes that it would send.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from dmoe.config.schema import Config, ExchangeConfig
from dmoe.distributed.mesh import ParallelMesh, build_mesh


@contextmanager
def fake_world(world: int, ep: int, rank: int = 0) -> Iterator[ParallelMesh]:
    """Be `rank` of `world` ranks for this block. No process group may exist."""
    if world == 1:
        yield ParallelMesh()
        return
    assert not dist.is_initialized(), "this process is in a world already"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    chunks = _first_chunk if rank == 0 else all_chunks
    try:
        with mock.patch.object(_fsdp_param, "_chunk_with_empty", chunks):
            yield build_mesh(ep, torch.device("meta"))
    finally:
        dist.destroy_process_group()


all_chunks: Any = vars(_fsdp_param)["_chunk_with_empty"]
"""FSDP2's division of a parameter among the ranks: a list with a tensor for each of them."""


def _first_chunk(tensor: Tensor, num_chunks: int, dim: int) -> list[Tensor]:
    """Return the chunk of rank 0 alone, which is all that FSDP2 reads there; torch 2.13.

    Of 1,024 ranks, the others are 1,023 tensors for each parameter.
    """
    size = tensor.shape[dim]
    if size == 0:
        return list(all_chunks(tensor, num_chunks, dim))
    return [tensor.narrow(dim, 0, -(-size // num_chunks))]


def counted_exchange(config: Config) -> ExchangeConfig:
    """Return the options of the exchange whose bytes are counted in place of the config's.

    Of two levels those of one: between nodes they are the same. A library sends the rows of
    `once_per_rank`.
    """
    exchange = config.parallel.exchange
    by_library = exchange.library != "torch" and config.moe.top_k > 1
    once = exchange.once_per_rank or by_library
    return replace(exchange, levels=1, library="torch", once_per_rank=once)


def materialize(model: nn.Module) -> None:
    """Replace tensors of the meta device by those of the CPU, sharded ones too.

    Under a FakeTensorMode they have no memory either, but autocast works on them.
    """
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None and id(old) not in made:
                    made[id(old)] = _on_cpu(old)
                tensors[name] = None if old is None else made[id(old)]


def _on_cpu(old: Tensor) -> Any:
    local = old.to_local() if isinstance(old, DTensor) else old
    new: Any = torch.empty(local.shape, dtype=local.dtype)
    if isinstance(old, DTensor):
        layout = (old.device_mesh, old.placements)
        new = DTensor.from_local(
            new, *layout, run_check=False, shape=old.shape, stride=old.stride()
        )
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


class Collective(NamedTuple):
    """One collective call."""

    name: str
    """all_to_all, all_reduce, all_gather, reduce_scatter or broadcast."""
    group: str
    """Name of the process group."""
    ranks: int
    sent: int
    """Bytes that this rank sends to other ranks, by the algorithm of least bytes: a ring for sums
    and gathers; all rows but its own for all_to_all."""
    buffers: int = 0
    """Bytes of what goes in and of what comes out, of an all_to_all."""


COLLECTIVES = {
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "allreduce_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "broadcast_": "broadcast",
}


def collective_of(name: str, args: Any) -> Collective | None:
    """Return the collective of a call of operator `c10d::name`; None if it sends nothing."""
    kind = COLLECTIVES.get(name)
    if kind is None:
        return None
    group = next(
        dist.ProcessGroup.unbox(a)
        for a in args
        if isinstance(a, torch.ScriptObject)
        if "ProcessGroup" in str(a._type())
    )
    ranks = group.size()
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    size = max(t.numel() * t.element_size() for t in tensors)
    if kind == "all_to_all":
        rows = tensors[1]
        splits = args[4] if len(args) > 4 and isinstance(args[4], (list, tuple)) else None
        own = len(rows) // ranks if not splits else splits[group.rank()]
        row = rows.element_size() * math.prod(rows.shape[1:])
        buffers = sum(t.numel() * t.element_size() for t in tensors[:2])
        return Collective(kind, group.group_name, ranks, (len(rows) - own) * row, buffers)
    if kind == "all_reduce":
        sent = 2 * size * (ranks - 1) // ranks
    elif kind == "broadcast":
        sent = size
    else:  # the larger operand is the whole
        sent = size * (ranks - 1) // ranks
        if name == "allgather_":  # a list of parts
            sent = size * (ranks - 1)
    return Collective(kind, group.group_name, ranks, sent)
