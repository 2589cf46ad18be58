"""Parallel mesh: ranks, degrees and process groups.

Eight ranks, EP = 4. A row holds every expert once, a column holds replicas of the same experts:

                 ep ->
               +----------------------+
    edp  row 0 | rank 0   1   2   3   |   tokens are exchanged along a row (all-to-all)
     |   row 1 | rank 4   5   6   7   |   expert gradients are summed down a column
     v         +----------------------+   all other sums are over all eight ranks

Every rank is a data-parallel rank: it reads its own sequences.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.config.errors import ConfigError
from dmoe.config.schema import ExchangeConfig

MAX_CONTROL_CTAS = 4
"""Thread blocks of NCCL for a sum of a few thousand numbers."""


@dataclass(frozen=True)
class ParallelMesh:
    """Rank, degrees and process groups. A group of one rank is None.

    Uses that can be in flight together have communicators of their own: the backward interleaves
    all-to-alls and gradient sums in an order that can differ by rank, which on one communicator
    deadlocks (Megatron-LM#5749). On NCCL each holds GPU memory for its channels.
    """

    rank: int = 0
    world_size: int = 1
    ep: int = 1
    ep_group: dist.ProcessGroup | None = None
    """The row of this rank: the ranks of its token all-to-all."""
    edp_group: dist.ProcessGroup | None = None
    """The column of this rank: the ranks that hold the same experts."""
    control_group: dist.ProcessGroup | None = None
    """All ranks, for sums inside a layer's forward, and between passes for the control reduction of
    each step, evaluation and checkpoints."""
    node_group: dist.ProcessGroup | None = None
    """The ranks of the row on this rank's node (`parallel.exchange.levels=2`)."""
    cross_group: dist.ProcessGroup | None = None
    """The ranks of the row with this rank's place on other nodes, likewise."""
    checkpoint_group: dist.ProcessGroup | None = None
    """All ranks, on the CPU (gloo), only for the checkpoint writer, which may be a thread."""

    @property
    def edp(self) -> int:
        """Number of replicas of each expert."""
        return self.world_size // self.ep

    @property
    def ep_rank(self) -> int:
        """Position in the row."""
        return self.rank % self.ep

    @property
    def edp_rank(self) -> int:
        """Position in the column."""
        return self.rank // self.ep

    def local_experts(self, num_experts: int) -> range:
        """Return the global ids of the experts on this rank."""
        per_rank = num_experts // self.ep
        return range(self.ep_rank * per_rank, (self.ep_rank + 1) * per_rank)

    def step_groups(self) -> list[dist.ProcessGroup]:
        """List the groups that a step uses, the world's included; their time-outs shorten later.

        `checkpoint_group` is not among them: there a rank waits for another's disk.
        """
        groups = [
            group
            for group in (
                *(self.ep_group, self.edp_group, self.control_group),
                *(self.node_group, self.cross_group),
            )
            if group is not None
        ]
        world = dist.group.WORLD
        return groups if world is None else [*groups, world]

    def __str__(self) -> str:
        if self.world_size == 1:
            return "1 process with all experts"
        copies = "1 copy" if self.edp == 1 else f"{self.edp} copies"
        ranks = "1 rank" if self.ep == 1 else f"{self.ep} ranks"
        return (
            f"{self.world_size} data ranks = {copies} of the experts (edp) x {ranks} per copy (ep)"
        )


def build_mesh(
    ep: int, device: torch.device, timeout: float | None = None, node_size: int | None = None
) -> ParallelMesh:
    """Create all process groups, in the same order on all ranks, and use each once. Collective.

    A communicator first used in the middle of a step would be created there, without the user's
    time-out (Megatron-LM#2238).

    Args:
        ep: expert-parallel size; must divide the world size (`config.rules` has checked it).
        device: device of the all-reduce that initialises each group.
        timeout: seconds any collective of these groups may wait, until `set_timeouts`. A new group
            does not inherit the world's: None is torch's default, 10 (NCCL) or 30 minutes.
        node_size: ranks of a node, where rows are exchanged in two levels (`ranks_per_node`).
    """
    if not dist.is_initialized():
        assert ep == 1, f"ep={ep} needs a process group"
        return ParallelMesh()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    assert world_size % ep == 0, f"ep={ep} does not divide the world size {world_size}"
    rows = [list(range(start, start + ep)) for start in range(0, world_size, ep)]
    columns = [list(range(column, world_size, ep)) for column in range(ep)]
    limit = None if timeout is None else timedelta(seconds=timeout)
    size = node_size or 1
    nodes = [row[first : first + size] for row in rows for first in range(0, ep, size)]
    across = [row[place::size] for row in rows for place in range(size)] if node_size else []
    mesh = ParallelMesh(
        rank=rank,
        world_size=world_size,
        ep=ep,
        ep_group=_new_group_of_rank(rows, rank, limit),
        edp_group=_new_group_of_rank(columns, rank, limit),
        node_group=_new_group_of_rank(nodes, rank, limit),
        cross_group=_new_group_of_rank(across, rank, limit),
        control_group=dist.new_group(timeout=limit, pg_options=_few_channels(limit)),
        checkpoint_group=_new_cpu_group(world_size, limit),
    )
    for group in mesh.step_groups():
        dist.all_reduce(torch.zeros(1, device=device), group=group)
    if mesh.checkpoint_group is not None:
        dist.all_reduce(torch.zeros(1, device="cpu"), group=mesh.checkpoint_group)
    return mesh


def launched_mesh(ep: int, device: torch.device, exchange: ExchangeConfig | None) -> ParallelMesh:
    """Create the process groups that `exchange` needs; nodes are those of the launcher's variables.

    Collective, as `build_mesh`.
    """
    host_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return build_mesh(ep, device, node_size=ranks_per_node(exchange, ep, host_size, device))


def ranks_per_node(
    exchange: ExchangeConfig | None, ep: int, host_size: int, device: torch.device
) -> int | None:
    """Return the ranks of a node if the exchange has two levels, else None.

    Collective with two levels: an all-reduce of two numbers.

    Args:
        exchange: its options.
        ep: expert-parallel size.
        host_size: number of ranks on this host; ranks are numbered host by host.
        device: device of the all-reduce.

    Raises:
        ConfigError: hosts of unequal size, or an EP group that is not several whole hosts.
    """
    if exchange is None or exchange.levels == 1 or ep == 1:
        return None
    sizes = torch.tensor([host_size, -host_size], device=device)
    dist.all_reduce(sizes, dist.ReduceOp.MAX)
    largest, smallest = sizes[0].item(), -sizes[1].item()
    why = None
    if largest != smallest:
        why = f"needs as many ranks on each node, and there are {smallest:.0f} to {largest:.0f}"
    elif host_size == 1:
        why = "saves nothing with one rank per node (LOCAL_WORLD_SIZE)"
    elif ep % host_size or ep == host_size:
        why = f"needs an EP group of several whole nodes of {host_size} ranks, not of {ep} ranks"
    if why is not None:
        raise ConfigError("parallel.exchange.levels", 2, why, "use 1")
    return host_size


def _new_group_of_rank(
    partition: list[list[int]], rank: int, timeout: timedelta | None
) -> dist.ProcessGroup | None:
    """Create every group of the partition, as every rank must, and return the one with `rank`."""
    own_group = None
    for ranks in partition:
        if len(ranks) > 1:
            group = dist.new_group(ranks, timeout=timeout)
            own_group = group if rank in ranks else own_group
    return own_group


def _few_channels(timeout: timedelta | None) -> Any:
    """Return the options of a group for small sums; None for the defaults, and without NCCL.

    By default a communicator takes the channels, with GPU memory and multiprocessors for each, that
    the largest messages need.
    """
    if dist.get_backend() != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = MAX_CONTROL_CTAS
    if timeout is not None:
        options._timeout = timeout  # torch warns if it differs from the argument of `new_group`
    return options


def _new_cpu_group(world_size: int, timeout: timedelta | None) -> dist.ProcessGroup | None:
    """Create a gloo group of all ranks; a fake one if the world is torch's fake back-end."""
    if world_size == 1:
        return None
    backend = "fake" if dist.get_backend() == "fake" else "gloo"
    group: dist.ProcessGroup = dist.new_group(timeout=timeout, backend=backend)
    return group


class ProcessGroupComm:
    """`moe.interfaces.DataParallelComm` over all ranks, on `control_group`."""

    def __init__(self, mesh: ParallelMesh, averages: bool = False) -> None:
        self.averages = averages
        assert mesh.control_group is not None
        self.group, self.size, self.rank = mesh.control_group, mesh.world_size, mesh.rank

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over all ranks, without autograd."""
        total = value.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def gather(self, value: Tensor) -> Tensor:
        """Return [W, ...], the values of all ranks, without autograd."""
        value = value.detach().contiguous()
        parts = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(parts, value, group=self.group)
        return torch.stack(parts)
