"""Experts that move between the ranks of an EP group, with their weights and moments.

A move changes which rank holds an expert, in place: parameters, their hooks, the optimizer's groups
and the names of a checkpoint stay, only rows of the stacks [e, ...] change places, and with them
the physical ids that tokens are sent to (`moe.placement`). Every copy of an expert moves alike. It
happens between two steps, when there are no gradients.

Under FSDP2 a stack is sharded over the copies too: within each expert, then the slices stay with
their ranks of the copies; or by whole experts, then an expert may also go to another row.

Cost: per layer that moves one all-to-all for each dtype, of exactly what moves; memory for twice
the part of one layer that a rank sends. Bytes per moved expert and copy: weights and moments, i.e.
three times its weights with AdamW.

Letters: E experts, e experts per rank, L MoE layers.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from operator import eq
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from dmoe.config.errors import ConfigError
from dmoe.config.schema import PlacementConfig
from dmoe.distributed.gradients import all_reduce_max, local_tensor
from dmoe.distributed.mesh import ParallelMesh
from dmoe.moe.base_layer import MoELayer
from dmoe.moe.placement import ExpertPlacement
from dmoe.moe.placement_plan import plan_placement

Planner = Callable[[Sequence[float], ExpertPlacement], ExpertPlacement]


@dataclass(frozen=True)
class Moved:
    """What moves have cost since it was last asked."""

    moves: int = 0
    """Experts that changed their rank, of all layers; copies are not counted again."""
    moved_bytes: int = 0
    """Sent to other ranks, by all of them."""
    move_seconds: float = 0.0
    """Of this rank, in all-to-alls and copies, waiting for others included."""

    def __add__(self, other: Moved) -> Moved:
        return Moved(*map(sum, zip(astuple(self), astuple(other), strict=True)))


class PeriodicPlacement:
    """`parallel.placement.kind=periodic`: every `every` steps, experts move by the expected load.

    The load is that of the counts that every step reduces anyway, so all ranks know the same and
    make the same plan: an ordinary step has no collective more. With `from: ema` it is

        mean = mean + (rows - mean) / every          mean = rows in the first step
    """

    def __init__(
        self,
        config: PlacementConfig,
        layers: Sequence[MoELayer],
        optimizer: Optimizer,
        mesh: ParallelMesh,
        host_size: int = 1,
    ) -> None:
        """Learn the hosts of the EP group. Collective.

        Args:
            config: section `parallel.placement`.
            layers: MoE layers, in the order of a step's counts.
            optimizer: of the run; its moments move too.
            mesh: the ranks.
            host_size: number of ranks on the host of this rank.
        """
        self.config, self.layers, self.optimizer, self.mesh = config, layers, optimizer, mesh
        self.runs = [layer.placement for layer in layers]
        """Where the experts are at first: the order of a checkpoint."""
        for layer in layers:
            if len({len(own) for own in layer.placement.experts}) > 1:
                allowed = f"needs as many experts on each rank, unlike MoE layer {layer.layer}"
                raise ConfigError("parallel.placement.kind", "periodic", allowed, "use fixed")
        device = next(layers[0].experts.parameters()).device
        sizes = torch.tensor([host_size, -host_size], device=device)
        largest, smallest = all_reduce_max(sizes, mesh).tolist()
        # Hosts of unequal size: as one host, since all ranks must make the same plan.
        size = largest if largest == -smallest else mesh.world_size
        hosts = [rank // size for rank in range(mesh.ep)]
        self.plan: Planner = partial(plan_placement, host_of_rank=hosts)
        self.expected_LE: list[list[float]] | None = None
        """Rows of each expert in a step; None before the first one."""
        self._moved = Moved()

    def after_step(self, step: int, rows_LE: Sequence[Sequence[int]], *, last: bool) -> None:
        """Learn the rows that the experts computed in step `step`, from 1, and move where due.

        Collective where something moves. `last`: of the run, after which nothing needs to move.
        """
        rows_LE = [
            rows_E[: layer.num_experts - layer.num_zero_cost]
            for layer, rows_E in zip(self.layers, rows_LE, strict=True)
        ]
        if self.expected_LE is None or self.config.from_ == "last":
            self.expected_LE = [[float(rows) for rows in rows_E] for rows_E in rows_LE]
        else:
            share = 1 / self.config.every
            self.expected_LE = [
                [mean + (rows - mean) * share for mean, rows in zip(*pair, strict=True)]
                for pair in zip(self.expected_LE, rows_LE, strict=True)
            ]
        if step % self.config.every == 0 and not last:
            pairs = zip(self.expected_LE, self.layers, strict=True)
            self._moved += self.move_to([self.plan(rows, layer.placement) for rows, layer in pairs])

    def move_to(self, placements: Sequence[ExpertPlacement]) -> Moved:
        """Move the experts of each layer to its new placement. Collective."""
        return move_experts(self.layers, self.optimizer, self.mesh, placements)

    @property
    def is_contiguous(self) -> bool:
        """True if every expert is where it was at first."""
        return all(map(eq, (layer.placement for layer in self.layers), self.runs))

    def make_contiguous(self) -> None:
        """Move all experts to their equal, contiguous runs. Collective where one is elsewhere."""
        self.move_to(self.runs)

    @contextmanager
    def contiguous(self) -> Iterator[None]:
        """Have all experts in their runs inside, the order of a checkpoint. Collective.

        Two moves where experts have moved. After an error inside, which all ranks have, they stay.
        """
        placements = [layer.placement for layer in self.layers]
        self.make_contiguous()
        yield
        self.move_to(placements)

    def take_metrics(self) -> dict[str, float]:
        """Return what moves have cost since the last call, by the names of metrics.jsonl."""
        moved, self._moved = self._moved, Moved()
        return asdict(moved)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to continue with the same bits, as JSON."""
        experts = [[[*own] for own in layer.placement.experts] for layer in self.layers]
        return {"experts": experts, "expected": self.expected_LE}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue from `state_dict`; at another EP size, all experts stay in their runs.

        Collective. Called with all experts in their runs. `state`: None if the run had no such
        placement.
        """
        self.expected_LE = None if state is None else state["expected"]
        if state is not None and all(len(ranks) == self.mesh.ep for ranks in state["experts"]):
            self.move_to([ExpertPlacement(tuple(map(tuple, own))) for own in state["experts"]])


def move_experts(
    layers: Sequence[MoELayer],
    optimizer: Optimizer,
    mesh: ParallelMesh,
    placements: Sequence[ExpertPlacement],
) -> Moved:
    """Move the experts of each layer to its new placement. Collective where one differs.

    A rank that dies meanwhile ends the run, as in any collective; the checkpoints on disk are not
    touched.

    `placements`: one per layer, equal on all ranks. The moments of `optimizer` move too.
    """
    began, total = time.monotonic(), Moved()
    for layer, new in zip(layers, placements, strict=True):
        if new != layer.placement:
            total += _move_layer(layer, optimizer, mesh, new)
            layer.placement = new  # with it the physical ids, which it keeps per device
    return replace(total, move_seconds=time.monotonic() - began)


def moving_tensors(layer: MoELayer, optimizer: Optimizer) -> list[Tensor]:
    """List the stacks [e, ...] of a layer: all weights and buffers of experts, and the moments.

    As a checkpoint does, which takes each for a stack, those of one number per expert too.
    """
    tensors: list[Tensor] = []
    for parameter in layer.experts.parameters():
        state = optimizer.state.get(parameter, {})
        tensors += [parameter, *(value for value in state.values() if _like(value, parameter))]
    return [*tensors, *layer.experts.buffers()]


def _like(value: object, parameter: Tensor) -> bool:
    """Return whether a value of the optimizer's state has an entry per expert."""
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(parameter)


def _move_layer(
    layer: MoELayer, optimizer: Optimizer, mesh: ParallelMesh, new: ExpertPlacement
) -> Moved:
    old, tensors = layer.placement, moving_tensors(layer, optimizer)
    before, after = old.physical_ids.values, new.physical_ids.values
    slots = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    sent = 0
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        sent += _exchange(same, slots, old.experts_per_rank, mesh, tensors[0].device)
    moves = sum(old.rank_of[expert] != new.rank_of[expert] for expert in old.rank_of)
    return Moved(moves, sent)


class _Row(NamedTuple):
    """One row of a stack that moves: from a rank of the group and its local index to another."""

    source: int
    target: int
    tensor: int
    source_index: int
    target_index: int
    size: int


@torch.no_grad()
def _exchange(
    tensors: Sequence[Tensor],
    slots: Sequence[tuple[int, int]],
    experts_per_rank: int,
    mesh: ParallelMesh,
    device: torch.device,
) -> int:
    """Send the rows of stacks from their old slots (physical ids) to the new ones. Collective.

    All is received before anything is overwritten. Returns the bytes that all ranks send to others.
    `device`: of the buffers; a moment may be in the memory of the host.
    """
    local = [local_tensor(tensor) for tensor in tensors]
    over_rows = any(map(_is_split, tensors))
    group = dist.group.WORLD if over_rows else mesh.ep_group
    assert group is not None, "experts move between the ranks of an EP group"
    rows: list[_Row] = []
    for number, tensor in enumerate(tensors):
        is_split = _is_split(tensor)
        size = math.prod(tensor.shape[1:] if is_split else local[number].shape[1:])
        # Whole experts that are split over the copies exist once; others in each row of the mesh.
        for first in range(0, mesh.world_size, mesh.ep) if over_rows and not is_split else (0,):
            for slot, new_slot in slots:
                source, i = _holder(slot, is_split, experts_per_rank, mesh)
                target, j = _holder(new_slot, is_split, experts_per_rank, mesh)
                rows.append(_Row(first + source, first + target, number, i, j, size))
    rows.sort(key=lambda row: row[:2])  # stable: the same order on both sides
    rank, ranks = dist.get_rank(group), range(dist.get_world_size(group))
    sizes = Counter[tuple[int, int]]()
    for row in rows:
        sizes[row.source, row.target] += row.size
    leaving = [local[row.tensor][row.source_index] for row in rows if row.source == rank]
    empty = torch.empty(0, dtype=local[0].dtype, device=device)
    sent = torch.cat([empty, *(row.flatten().to(device) for row in leaving)])
    received = empty.new_empty(sum(sizes[source, rank] for source in ranks))
    dist.all_to_all_single(
        received,
        sent,
        [sizes[source, rank] for source in ranks],
        [sizes[rank, target] for target in ranks],
        group=group,
    )
    arriving = [row for row in rows if row.target == rank]
    parts = received.split([row.size for row in arriving])
    for row, part in zip(arriving, parts, strict=True):
        place = local[row.tensor][row.target_index]
        place.copy_(part.view_as(place))
    between = sum(size for (source, target), size in sizes.items() if source != target)
    return between * received.element_size() * (1 if over_rows else mesh.edp)


def _is_split(tensor: Tensor) -> bool:
    """Return whether FSDP2 shards a stack by whole experts over the copies."""
    return isinstance(tensor, DTensor) and tensor.placements == (Shard(0),)


def _holder(
    slot: int, is_split: bool, experts_per_rank: int, mesh: ParallelMesh
) -> tuple[int, int]:
    """Return the rank that has a slot, of the first row of the mesh unless split; local index."""
    ep_rank, index = divmod(slot, experts_per_rank)
    if not is_split:
        return ep_rank, index
    row, index = divmod(index, -(-experts_per_rank // mesh.edp))
    return row * mesh.ep + ep_rank, index
