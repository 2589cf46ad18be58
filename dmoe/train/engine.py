"""Everything an optimizer step needs, built once: the sharded model, the optimizer, accelerate's part, the gradient sums.

Which floating point type the matrix products run in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from dmoe.config.errors import ConfigError
from dmoe.config.rules import Batching, batching, expert_parallel
from dmoe.config.schema import Config
from dmoe.distributed import data_parallel as ddp
from dmoe.distributed import data_parallel as fsdp
from dmoe.distributed import expert_parallel as parallelize
from dmoe.distributed import mesh as topology
from dmoe.distributed.collective_check import CollectiveChecker
from dmoe.distributed.data_parallel import make_grad_scaler
from dmoe.distributed.expert_parallel import DataParallel
from dmoe.distributed.init import ProcessInfo
from dmoe.distributed.mesh import ParallelMesh
from dmoe.models.base import Model, ModelOutput
from dmoe.moe.routing import TokenContext
from dmoe.train import optim as optimizers
from dmoe.train.modular.attach import attach_modules, draw_modules, select_trained
from dmoe.train.tasks import Task, task_of

DATA_PARALLEL: dict[str, Callable[[nn.Module, ParallelMesh, Accelerator], DataParallel]] = {
    "ddp": ddp.DDPStrategy,
    "fsdp": fsdp.FSDPStrategy,
}
ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass
class Engine:
    config: Config
    process: ProcessInfo
    mesh: ParallelMesh
    batching: Batching
    precision: str
    accelerator: Accelerator
    task: Task
    model: Model
    """The bare model: names, weights, MoE layers."""
    data_parallel: DataParallel
    """How the ranks share what is the same on all of them: `parallel.mode`."""
    optimizer: torch.optim.Optimizer
    collective_checker: CollectiveChecker | None
    """Compares the ranks' exchanges, if `debug.collectives`."""

    @property
    def wrapped(self) -> nn.Module:
        """What is called: the model under autocast, inside DDP or FSDP2 where there are other ranks."""
        return self.data_parallel.wrapped

    @property
    def sequences(self) -> int:
        """Sequences of one forward of this process: V virtual ranks' micro-batches."""
        return self.batching.micro_batch * self.config.parallel.virtual_ranks

    @property
    def targets(self) -> int:
        """Targets of the global batch: what the loss is divided by."""
        return self.config.train.global_batch * self.task.targets

    def close(self) -> None:
        self.accelerator.free_memory()


def build(
    config: Config, process: ProcessInfo, outputs: int, dtype: torch.dtype = torch.float32
) -> Engine:
    """Build, shard, initialise and wrap, in this order: no rank ever holds an expert that is not its own.

    `outputs`: the vocabulary, or the classes. `dtype`: of the master weights; float64 is for `verify`. Collective over all ranks.
    """
    precision = resolve(config.train.precision, process.device, config.model.dim)
    mesh = topology.build_mesh(
        expert_parallel(config, process.world_size), process.device, config.parallel.start_timeout
    )
    checker = (
        CollectiveChecker(mesh.ep_group, config.parallel.timeout)
        if config.debug.collectives and mesh.ep_group
        else None
    )
    task = task_of(config, outputs)
    model = _model(task, mesh, checker, process, dtype)
    accelerator = Accelerator(
        cpu=process.device.type == "cpu",
        mixed_precision=ACCELERATE_PRECISION[precision],
        step_scheduler_with_optimizer=False,
    )
    if precision == "fp16":
        accelerator.scaler = make_grad_scaler(mesh, process.device)
    data_parallel = DATA_PARALLEL[config.parallel.mode](model, mesh, accelerator)
    optimizer = accelerator.prepare_optimizer(optimizers.build(model, config.optim))
    engine = Engine(
        config,
        process,
        mesh,
        batching(config, process.world_size),
        precision,
        accelerator,
        task,
        model,
        data_parallel,
        optimizer,
        checker,
    )
    _warm_up(engine)
    return engine


def _warm_up(engine: Engine) -> None:
    """One forward and backward on samples that mean nothing, thrown away: every communicator is used, under the start's time-out.

    And DDP sorts its buckets anew after its first backward. A ring sums a number in an order that depends on its place in the bucket,
    so without this the second step after a restart would round differently from the same step of the unbroken run, on three ranks
    or more (seen: 1e-7 of the loss).
    """
    input, target, _ = (
        part.to(engine.process.device) for part in engine.task.dummy_batch(engine.sequences)
    )
    context = TokenContext(label_T=torch.zeros_like(target).flatten(), noise_key=(0, 0))
    with engine.data_parallel.grad_sync(last=True):
        output: ModelOutput = engine.wrapped(input, target, context)
        assert output.loss_sum is not None
        engine.accelerator.backward(output.loss_sum)
    engine.data_parallel.wait_for_grads()
    engine.optimizer.zero_grad()


def _model(
    task: Task,
    mesh: ParallelMesh,
    checker: CollectiveChecker | None,
    process: ProcessInfo,
    dtype: torch.dtype,
) -> Model:
    config = task.config
    with torch.device("meta"):
        model = task.model(config.parallel.virtual_ranks, config.train.recompute)
        attach_modules(model, config, config.parallel.virtual_ranks)
    model = model.to(dtype)
    parallelize.shard_experts(model, mesh, checker)
    model.to_empty(device=process.device)
    model.initialize(config.train.seed)
    draw_modules(model, config)
    select_trained(model, config)
    return model


NARROWEST_BF16_ON_CPU = 512
"""Below this width bf16 loses on a CPU: oneDNN compiles a kernel for every new number of rows, and an expert's rows are never the same
twice. Measured on one thread with AMX, a quickstart step at width 128: fp32 122 ms, bf16 264; at 512: fp32 925 ms, bf16 654."""


def resolve(precision: str, device: torch.device, dim: int) -> str:
    """`auto | fp32 | bf16 | fp16` -> `fp32 | bf16 | fp16`; parameters and optimizer state stay float32 in all of them.

    auto is bf16 where the hardware multiplies it natively (CUDA from Ampere on, CPUs with amx_bf16 or avx512_bf16) and where
    that pays, which on a CPU takes a model width `dim` of 512.
    """
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError(
            "train.precision",
            precision,
            "fp16 needs a GPU (accelerate has no fp16 loss scaling on CPU)",
            "use bf16 or auto",
        )
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if dim < NARROWEST_BF16_ON_CPU:
        return "fp32"
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if native else "fp32"
