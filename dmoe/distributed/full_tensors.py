"""A rank's values as the whole model's: for comparing runs, not for training.

Deliberately not by way of `state.py`: `verify` checks checkpoints with this, so it must not share their mistakes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from dmoe.distributed.expert_parallel import ExpertLocation
from dmoe.distributed.gradients import local_tensor
from dmoe.distributed.mesh import ParallelMesh


def gather_full(
    values: Mapping[str, Tensor],
    experts: set[str],
    mesh: ParallelMesh,
    locations: Mapping[str, ExpertLocation] | None = None,
) -> dict[str, Tensor]:
    """`values` by name, each whole: shards put together, experts of all EP ranks in global order [E, ...]. On every rank.

    homes: `expert_homes` of the model, the matrices that one EP rank has alone; values must hold all of its own, or no tensor at all.
    One all-gather an expert stack over the exchange group, one broadcast a matrix of `homes`, and what DTensor needs for sharded ones.
    """
    locations = locations or {}
    whole = (
        {name: broadcast_expert(values.get(name), home, mesh) for name, home in locations.items()}
        if values
        else {}
    )
    for name, value in values.items():
        if name in locations:
            continue
        full = value.full_tensor() if isinstance(value, DTensor) else value
        whole[name] = _all_experts(full.detach(), mesh) if name in experts else full.detach()
    return whole


def broadcast_expert(
    value: Tensor | None,
    location: ExpertLocation,
    mesh: ParallelMesh,
    shape: tuple[int, ...] | None = None,
) -> Tensor:
    """What the ranks of one column hold, on every rank. `value` is None on the others; `shape` where it is not the matrix's own."""
    full = value.full_tensor() if isinstance(value, DTensor) else value
    if mesh.ep_group is None:
        assert full is not None, "one rank of an EP group of one has every expert"
        return full.detach()
    sent = (
        torch.empty(location.shape if shape is None else shape, dtype=location.dtype)
        if full is None
        else full.detach().contiguous()
    )
    dist.broadcast(sent, group=mesh.ep_group, group_src=location.ep_rank)
    return sent


def full_norm(value: Tensor) -> float:
    """The 2-norm of the whole of `value`, on every rank; a collective if it is sharded."""
    total = value.detach().norm()
    return float(total.full_tensor() if isinstance(total, DTensor) else total)


def full_tensor(value: Tensor) -> Tensor:
    """A copy of the whole of a tensor of `state.model_state`, on every rank. A collective if it is sharded."""
    return value.full_tensor().detach() if isinstance(value, DTensor) else value.detach().clone()


def copy_full_into_shard(value: Tensor, full: Tensor) -> None:
    """Fill this rank's part of `value` from the whole, which every rank has. No collective."""
    if isinstance(value, DTensor):
        full = local_tensor(
            distribute_tensor(full, value.device_mesh, value.placements, src_data_rank=None)
        )
    with torch.no_grad():
        local_tensor(value).copy_(full)


def _all_experts(local: Tensor, topology: ParallelMesh) -> Tensor:
    if topology.ep_group is None:
        return local
    parts = [
        torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(topology.ep)
    ]
    dist.all_gather(parts, local.contiguous(), group=topology.ep_group)
    return torch.cat(parts)
