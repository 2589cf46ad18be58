"""Everything an optimizer step needs, built once: the sharded model, the optimizer, accelerate's part, the gradient sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from dmoe.config.check import Batching, batching, expert_parallel
from dmoe.config.schema import Config
from dmoe.distributed import ddp, fsdp, parallelize, topology
from dmoe.distributed.parallelize import Replication
from dmoe.distributed.scaler import shared_scaler
from dmoe.distributed.topology import Topology
from dmoe.distributed.watch import Watch
from dmoe.distributed.world import World
from dmoe.models.transformer import Transformer
from dmoe.training import optimizer as optimizers
from dmoe.training import precision as precisions

__all__ = ["Engine", "build"]

REPLICATION: dict[str, Callable[[nn.Module, Topology, Accelerator], Replication]] = {
    "ddp": ddp.Replicated,
    "fsdp": fsdp.Sharded,
}
ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass
class Engine:
    config: Config
    world: World
    topology: Topology
    batching: Batching
    precision: str
    accelerator: Accelerator
    model: Transformer
    """The bare model: names, weights, MoE layers."""
    replication: Replication
    """How the ranks share what is the same on all of them: `parallel.mode`."""
    optimizer: torch.optim.Optimizer
    watch: Watch | None
    """Compares the ranks' exchanges, if `debug.collectives`."""

    @property
    def wrapped(self) -> nn.Module:
        """What is called: the model under autocast, inside DDP or FSDP2 where there are other ranks."""
        return self.replication.wrapped

    @property
    def sequences(self) -> int:
        """Sequences of one forward of this process: V virtual ranks' micro-batches."""
        return self.batching.micro_batch * self.config.parallel.virtual_ranks

    def close(self) -> None:
        self.accelerator.free_memory()


def build(config: Config, world: World, vocab_size: int, dtype: torch.dtype = torch.float32) -> Engine:
    """Build, shard, initialise and wrap, in this order: no rank ever holds an expert that is not its own.

    `dtype` is that of the master weights; float64 is for `verify`. Collective over all ranks.
    """
    precision = precisions.resolve(config.train.precision, world.device, config.model.dim)
    groups = topology.build(expert_parallel(config, world.size), world.device)
    watch = Watch(groups.exchange, config.parallel.timeout) if config.debug.collectives and groups.exchange else None
    model = _model(config, groups, watch, world, vocab_size, dtype)
    accelerator = Accelerator(
        cpu=world.device.type == "cpu",
        mixed_precision=ACCELERATE_PRECISION[precision],
        step_scheduler_with_optimizer=False,
    )
    if precision == "fp16":
        accelerator.scaler = shared_scaler(groups, world.device)
    replication = REPLICATION[config.parallel.mode](model, groups, accelerator)
    optimizer = accelerator.prepare_optimizer(optimizers.build(model, config.optim))
    return Engine(
        config, world, groups, batching(config, world.size), precision, accelerator, model, replication, optimizer, watch
    )


def _model(
    config: Config, groups: Topology, watch: Watch | None, world: World, vocab_size: int, dtype: torch.dtype
) -> Transformer:
    with torch.device("meta"):
        model = Transformer(
            config.model, config.moe, vocab_size, virtual_ranks=config.parallel.virtual_ranks, recompute=config.train.recompute
        )
    model = model.to(dtype)
    parallelize.shard_experts(model, groups, watch)
    model.to_empty(device=world.device)
    model.initialize(config.train.seed)
    return model
