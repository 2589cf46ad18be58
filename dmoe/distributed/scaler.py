"""fp16 loss scaling that every rank changes alike."""

from __future__ import annotations

import torch
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from dmoe.distributed.topology import ParallelMesh

__all__ = ["shared_scaler"]


def shared_scaler(topology: ParallelMesh, device: torch.device) -> torch.amp.GradScaler:
    """A gradient scaler whose "found inf" is reduced over all ranks.

    With experts on different ranks an overflow can be one rank's alone; torch's plain GradScaler would skip the step and lower
    the scale there only, and the replicas would part without a word.
    """
    if topology.control_group is None:
        return torch.amp.GradScaler(device.type)
    return ShardedGradScaler(device.type, process_group=topology.control_group)
