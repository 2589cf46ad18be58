"""Collectives of many small tensors at once: full tensors of shards, expert stacks, single experts.

A collective of a small tensor costs its start and the wait for the slowest rank, and a model's
state has hundreds of tensors. Here tensors of one dtype and process group share a buffer of at most
`BUCKET_BYTES`; a larger tensor has one of its own. All ranks call with the same names in the same
order.

Letters: N ranks of a group, L numbers of a buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from dmoe.distributed.expert_parallel import ExpertLocation
from dmoe.distributed.gradients import local_tensor
from dmoe.distributed.mesh import ParallelMesh

BUCKET_BYTES = 32 << 20
"""Large enough that the start of a collective is a small part of it, small beside a model."""
Names = list[str]


class _Sharding(NamedTuple):
    """Where the shards of a DTensor are: the process group, and the dimension that is divided."""

    group: dist.ProcessGroup
    dim: int


def unsharded(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return every tensor in full, without autograd. Collective.

    One all-gather per bucket. A DTensor that is divided over more than one dimension of its mesh,
    or in another form than `Shard`, is gathered by `DTensor.full_tensor`.
    """
    full = {name: value.detach() for name, value in values.items()}
    sharded = dict[str, _Sharding]()
    for name, value in full.items():
        if isinstance(value, DTensor):
            sharding = _sharding_of(value)
            if sharding is None:
                full[name] = value.full_tensor()
            else:
                sharded[name] = sharding
    # by sizes of full tensors, which are the same on every rank
    divided = {name: full[name] for name in sharded}
    for names in _buckets(divided, lambda name: sharded[name].group.group_name):
        full |= _gather_shards({name: divided[name] for name in names}, sharded)
    return full


def _sharding_of(value: DTensor) -> _Sharding | None:
    found = [n for n, p in enumerate(value.placements) if not isinstance(p, Replicate)]
    if len(found) != 1 or type(placement := value.placements[found[0]]) is not Shard:
        return None
    return _Sharding(value.device_mesh.get_group(found[0]), placement.dim)


def _gather_shards(
    bucket: Mapping[str, Tensor], sharded: Mapping[str, _Sharding]
) -> dict[str, Tensor]:
    """Gather one bucket and put the shards of each tensor together.

    Shards are those of `torch.chunk`: rank 0 has the largest, which the buffers are as long as.
    """
    names = list(bucket)
    shards, group = {n: local_tensor(bucket[n]) for n in names}, sharded[names[0]].group
    ranks = dist.get_world_size(group)
    shapes = {n: _shard_shapes(bucket[n].shape, sharded[n].dim, ranks) for n in names}
    own = dist.get_rank(group)
    assert all(shards[n].shape == shapes[n][own] for n in names), "not the shards of torch.chunk"
    length = sum(shapes[n][0].numel() for n in names)
    own_L = _flat([shards[n] for n in names], length)
    parts: dict[str, list[Tensor]] = {n: [] for n in names}
    for rank, buffer_L in enumerate(_all_gather(own_L, group)):
        sizes = [shapes[n][rank].numel() for n in names]
        for name, part in zip(names, buffer_L[: sum(sizes)].split(sizes), strict=True):
            parts[name].append(part.view(shapes[name][rank]))
    return {name: torch.cat(parts[name], sharded[name].dim) for name in names}


def _shard_shapes(shape: torch.Size, dim: int, ranks: int) -> list[torch.Size]:
    """Return the shape of each rank's shard of a tensor; the last ones may be empty."""
    chunk, shapes = -(-shape[dim] // ranks), []
    for rank in range(ranks):
        size = min(chunk, max(0, shape[dim] - rank * chunk))
        shapes.append(torch.Size((*shape[:dim], size, *shape[dim + 1 :])))
    return shapes


def gather_stacks(stacks: Mapping[str, Tensor], mesh: ParallelMesh) -> dict[str, Tensor]:
    """Gather stacks [e, ...] of local experts over the EP group, [E, ...] in global order.

    One all-gather per bucket; every EP rank has equally many experts.
    """
    if mesh.ep_group is None:
        return dict(stacks)
    full = dict[str, Tensor]()
    for names in _buckets(stacks):
        own = [stacks[name] for name in names]
        sizes = [stack.numel() for stack in own]
        ranks = [buffer.split(sizes) for buffer in _all_gather(_flat(own), mesh.ep_group)]
        for name, stack, parts in zip(names, own, zip(*ranks, strict=True), strict=True):
            full[name] = torch.cat([part.view(stack.shape) for part in parts])
    return full


def broadcast_experts(
    values: Mapping[str, Tensor],
    locations: Mapping[str, ExpertLocation],
    mesh: ParallelMesh,
    shape: tuple[int, ...] | None = None,
) -> dict[str, Tensor]:
    """Send the tensors of single experts from their EP ranks to all ranks of the group.

    One broadcast per EP rank and bucket.

    Args:
        values: the tensors of the experts that this rank holds; others are not read.
        locations: where the matrix of each expert is.
        mesh: the ranks.
        shape: shape of the tensors, if it is not that of the matrices.

    Returns:
        The full tensors, on every rank.
    """
    held = unsharded({n: values[n] for n, at in locations.items() if at.ep_rank == mesh.ep_rank})
    if mesh.ep_group is None:
        return held
    full = dict[str, Tensor]()
    likes = {
        name: torch.empty(at.shape if shape is None else shape, dtype=at.dtype, device="meta")
        for name, at in locations.items()
    }
    for names in _buckets(likes, lambda name: locations[name].ep_rank):
        at, sizes = locations[names[0]], [likes[name].numel() for name in names]
        if at.ep_rank == mesh.ep_rank:
            buffer = _flat([held[name] for name in names])
        else:
            buffer = torch.empty(sum(sizes), dtype=at.dtype, device=at.device)
        dist.broadcast(buffer, group=mesh.ep_group, group_src=at.ep_rank)
        for name, part in zip(names, buffer.split(sizes), strict=True):
            full[name] = part.view(likes[name].shape)
    return {name: full[name] for name in locations}


def _buckets(
    tensors: Mapping[str, Tensor], key: Callable[[str], object] = lambda name: None
) -> Iterator[Names]:
    """Yield names of one key, dtype and device, of at most `BUCKET_BYTES` together, or alone."""
    groups = dict[object, Names]()
    for name, tensor in tensors.items():
        groups.setdefault((key(name), tensor.dtype, tensor.device), []).append(name)
    for group in groups.values():
        names, size = Names(), 0
        for name in group:
            bytes_ = tensors[name].numel() * tensors[name].element_size()
            if names and size + bytes_ > BUCKET_BYTES:
                yield names
                names, size = Names(), 0
            names.append(name)
            size += bytes_
        yield names


def _flat(tensors: Sequence[Tensor], length: int | None = None) -> Tensor:
    """Return the numbers of all tensors in a new buffer, with zeros up to `length`."""
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    missing = 0 if length is None else length - len(flat)
    return torch.cat([flat, flat.new_zeros(missing)]) if missing else flat


def _all_gather(own_L: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Return the buffers of all ranks of the group."""
    buffers = [torch.empty_like(own_L) for _ in range(dist.get_world_size(group))]
    if len(own_L):
        dist.all_gather(buffers, own_L, group=group)
    return buffers
