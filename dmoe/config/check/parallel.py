"""Who shares what: EP from the world, and how a global batch is cut.

Letters: W world size, EP expert-parallel degree, V virtual ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dmoe.config.check.model import moe_blocks
from dmoe.config.errors import ConfigError
from dmoe.config.schema import Config

__all__ = ["Batching", "batching", "can_share", "check_world", "expert_parallel"]

LARGEST_WORLD = 1 << 20
"""Ten times the largest job anyone has run; beyond it the number is a slip, and what divides it would take minutes to list."""


@dataclass(frozen=True)
class Batching:
    """How a global batch is cut: `global_batch = W * V * micro_batch * accumulation`."""

    micro_batch: int
    """Sequences of one virtual rank's micro-batch."""
    accumulation: int
    """Micro-batches a virtual rank takes one after the other in an optimizer step."""


def check_world(world: int) -> None:
    if not 1 <= world <= LARGEST_WORLD:
        raise ConfigError("world", world, f"must be a number of ranks from 1 to {LARGEST_WORLD}", "start fewer ranks")


def can_share(config: Config, ep: int) -> bool:
    """Whether so many ranks can share one copy of the experts: uniform ones in equal numbers, those of different shape at least one
    each (which rank has which: moe/ownership.py)."""
    experts = config.moe.num_experts
    return ep <= experts if config.moe.experts.shapes else experts % ep == 0


def expert_parallel(config: Config, world: int) -> int:
    """EP: the number given, or for `auto` the largest one that divides the world and that the experts can be shared by."""
    ep, experts = config.parallel.ep, config.moe.num_experts
    most = min(world, experts) if config.moe.experts.shapes else math.gcd(world, experts)
    if ep == "auto":
        return max(n for n in range(1, most + 1) if world % n == 0 and can_share(config, n)) if moe_blocks(config) else 1
    if not isinstance(ep, int) or ep < 1:
        raise ConfigError("parallel.ep", ep, "must be auto or a number of ranks from 1 up", "use parallel.ep=auto")
    fits = [n for n in range(1, most + 1) if world % n == 0 and can_share(config, n)]
    if world % ep:
        raise ConfigError("parallel.ep", ep, f"must divide the world of {world} ranks", f"use one of {fits}")
    if config.moe.experts.shapes and ep > experts:
        allowed = f"leaves some of the parallel.ep={ep} ranks without an expert"
        raise ConfigError("moe.num_experts", experts, allowed, f"use parallel.ep from {fits}")
    if not can_share(config, ep):
        raise ConfigError("moe.num_experts", experts, f"must be divisible by parallel.ep={ep}", f"use parallel.ep from {fits}")
    return ep


def batching(config: Config, world: int) -> Batching:
    """Micro-batch and accumulation from the global batch; the global batch never depends on the world."""
    ranks = world * config.parallel.virtual_ranks
    batch, micro = config.train.global_batch, config.train.micro_batch
    if batch % ranks:
        nearest = max(1, round(batch / ranks)) * ranks
        raise ConfigError(
            "train.global_batch", batch, f"must be a multiple of the {ranks} (virtual) ranks that share it", f"use {nearest}"
        )
    share = batch // ranks
    micro = share if micro is None else micro
    if share % micro:
        fits = max(n for n in range(1, min(micro, share) + 1) if share % n == 0)
        raise ConfigError("train.micro_batch", micro, f"must divide the {share} sequences of one (virtual) rank", f"use {fits}")
    return Batching(micro, share // micro)
