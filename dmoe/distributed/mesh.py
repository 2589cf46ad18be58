"""Which ranks share what.

Eight ranks, EP = 4: each row is one complete set of experts, each column holds copies of the same experts.

                 ep ->
               +----------------------+
    edp  row 0 | rank 0   1   2   3   |   tokens travel along a row (all-to-all)
     |   row 1 | rank 4   5   6   7   |   expert gradients are summed down a column
     v         +----------------------+   everything else is summed over all eight

Every rank is a data rank: it reads sequences of its own.

`moe.peers.Peers` over real ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ParallelMesh:
    """Rank, degrees and process groups. A group is None where it would have one member.

    Each use has a communicator of its own: token exchange and gradient sums on one communicator have deadlocked Megatron
    (Megatron-LM#5749), since backward interleaves them in an order that can differ by rank.
    """

    rank: int = 0
    world_size: int = 1
    ep: int = 1
    ep_group: dist.ProcessGroup | None = None
    """The row of this rank: its peers in the token all-to-all."""
    edp_group: dist.ProcessGroup | None = None
    """The column of this rank: the ranks that hold the same experts."""
    dp_group: dist.ProcessGroup | None = None
    """All ranks, for sums inside a layer's forward."""
    control_group: dist.ProcessGroup | None = None
    """All ranks, for the one control reduction a step, evaluation, and loading checkpoints."""
    checkpoint_group: dist.ProcessGroup | None = None
    """All ranks, on the CPU (gloo) whatever the others use, for the writer of checkpoints alone, which may be a thread of its own."""

    @property
    def edp(self) -> int:
        return self.world_size // self.ep

    @property
    def ep_rank(self) -> int:
        return self.rank % self.ep

    @property
    def edp_rank(self) -> int:
        return self.rank // self.ep

    def local_experts(self, num_experts: int) -> range:
        """Global ids of the experts on this rank."""
        per_rank = num_experts // self.ep
        return range(self.ep_rank * per_rank, (self.ep_rank + 1) * per_rank)

    def step_groups(self) -> list[dist.ProcessGroup]:
        """The groups a step uses, the world's included, whose time-outs shrink after the first step. Not `checkpoint`: there a rank
        waits for another's disk, which may take as long as it takes."""
        own = [
            group
            for group in (self.ep_group, self.edp_group, self.dp_group, self.control_group)
            if group is not None
        ]
        world = dist.group.WORLD
        return own if world is None else [*own, world]

    def __str__(self) -> str:
        if self.world_size == 1:
            return "1 process, which holds every expert"
        copies = "1 copy" if self.edp == 1 else f"{self.edp} copies"
        ranks = "1 rank" if self.ep == 1 else f"{self.ep} ranks"
        return f"{self.world_size} data ranks = {copies} of the experts (edp) x {ranks} a copy (ep)"


def build_mesh(ep: int, device: torch.device, timeout: float | None = None) -> ParallelMesh:
    """Create all groups, on all ranks in the same order, and use each once.

    A communicator that is first used in the middle of a step is created there, without the user's time-out (Megatron-LM#2238).
    `ep` must divide the world size (`config/check.py` refuses it otherwise). `timeout`: seconds that any collective of these groups
    may wait, until `shorten_timeouts`; a new group does not take over the world's, so None is torch's 10 (NCCL) or 30 minutes.
    """
    if not dist.is_initialized():
        assert ep == 1, f"ep={ep} needs a process group"
        return ParallelMesh()
    rank, world = dist.get_rank(), dist.get_world_size()
    assert world % ep == 0, f"ep={ep} does not divide the world of {world}"
    rows = [list(range(start, start + ep)) for start in range(0, world, ep)]
    columns = [list(range(column, world, ep)) for column in range(ep)]
    limit = None if timeout is None else timedelta(seconds=timeout)
    mesh = ParallelMesh(
        rank=rank,
        world_size=world,
        ep=ep,
        ep_group=_mine(rows, rank, limit),
        edp_group=_mine(columns, rank, limit),
        dp_group=dist.new_group(timeout=limit),
        control_group=dist.new_group(timeout=limit),
        checkpoint_group=_of_cpu_tensors(world, limit),
    )
    for group in mesh.step_groups():
        dist.all_reduce(torch.zeros(1, device=device), group=group)
    if mesh.checkpoint_group is not None:
        dist.all_reduce(torch.zeros(1, device="cpu"), group=mesh.checkpoint_group)
    return mesh


def _mine(parts: list[list[int]], rank: int, timeout: timedelta | None) -> dist.ProcessGroup | None:
    """The group of `parts` that holds `rank`. Every rank must create every group, in the same order."""
    mine = None
    for part in parts:
        if len(part) > 1:
            group = dist.new_group(part, timeout=timeout)
            mine = group if rank in part else mine
    return mine


def _of_cpu_tensors(world: int, timeout: timedelta | None) -> dist.ProcessGroup | None:
    """All ranks over gloo; over torch's fake back-end where the world is a fake one, whose other ranks nobody can connect to."""
    if world == 1:
        return None
    backend = "fake" if dist.get_backend() == "fake" else "gloo"
    group: dist.ProcessGroup = dist.new_group(timeout=timeout, backend=backend)
    return group


class ProcessGroupComm:
    """Sums over all data ranks, on a communicator of their own."""

    def __init__(self, mesh: ParallelMesh) -> None:
        assert mesh.dp_group is not None
        self.group, self.size, self.rank = mesh.dp_group, mesh.world_size, mesh.rank

    def sum(self, value: Tensor) -> Tensor:
        total = value.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def gather(self, value: Tensor) -> Tensor:
        value = value.detach().contiguous()
        parts = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(parts, value, group=self.group)
        return torch.stack(parts)
