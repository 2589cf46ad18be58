"""`moe.peers.Peers` over real ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.distributed.topology import ParallelMesh

__all__ = ["ProcessGroupComm"]


class ProcessGroupComm:
    """Sums over all data ranks, on a communicator of their own."""

    def __init__(self, topology: ParallelMesh) -> None:
        assert topology.dp_group is not None
        self.group, self.size, self.rank = topology.dp_group, topology.world_size, topology.rank

    def sum(self, value: Tensor) -> Tensor:
        total = value.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def gather(self, value: Tensor) -> Tensor:
        value = value.detach().contiguous()
        parts = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(parts, value, group=self.group)
        return torch.stack(parts)
