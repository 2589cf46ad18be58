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
from dmoe.models.transformer import LMOutput, Transformer
from dmoe.moe.routing import TokenContext
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
    groups = topology.build(expert_parallel(config, world.size), world.device, config.parallel.start_timeout)
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
    engine = Engine(
        config, world, groups, batching(config, world.size), precision, accelerator, model, replication, optimizer, watch
    )
    _warm_up(engine)
    return engine


def _warm_up(engine: Engine) -> None:
    """One forward and backward on two tokens a sequence, thrown away: every communicator is used, under the start's time-out.

    And DDP sorts its buckets anew after its first backward. A ring sums a number in an order that depends on its place in the bucket,
    so without this the second step after a restart would round differently from the same step of the unbroken run, on three ranks
    or more (seen: 1e-7 of the loss).
    """
    token_BS = torch.zeros(engine.sequences, 2, dtype=torch.int64, device=engine.world.device)
    context = TokenContext(label_T=torch.zeros_like(token_BS).flatten(), noise_key=(0, 0))
    with engine.replication.accumulating(last=True):
        output: LMOutput = engine.wrapped(token_BS, token_BS, context)
        assert output.loss_sum is not None
        engine.accelerator.backward(output.loss_sum)
    engine.replication.finish()
    engine.optimizer.zero_grad()


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
