"""A rank's values as the whole model's: for comparing runs, not for training.

Deliberately not by way of `state.py`: `verify` checks checkpoints with this, so it must not share their mistakes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dmoe.distributed.topology import Topology

__all__ = ["gathered", "norm"]


def gathered(values: Mapping[str, Tensor], experts: set[str], topology: Topology) -> dict[str, Tensor]:
    """`values` by name, each whole: shards put together, experts of all EP ranks in global order [E, ...]. On every rank.

    One all-gather an expert tensor over the exchange group, and what DTensor needs for sharded ones.
    """
    whole = {}
    for name, value in values.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        whole[name] = _all_experts(full.detach(), topology) if name in experts else full.detach()
    return whole


def norm(value: Tensor) -> float:
    """The 2-norm of the whole of `value`, on every rank; a collective if it is sharded."""
    total = value.detach().norm()
    return float(total.full_tensor() if isinstance(total, DTensor) else total)


def _all_experts(local: Tensor, topology: Topology) -> Tensor:
    if topology.exchange is None:
        return local
    parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(topology.ep)]
    dist.all_gather(parts, local.contiguous(), group=topology.exchange)
    return torch.cat(parts)
