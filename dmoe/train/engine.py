"""Engine: the sharded model, its precision and its optimizer, built once for all steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from dmoe.config.errors import ConfigError
from dmoe.config.rules import Batching, batching, expert_parallel
from dmoe.config.rules.exchange import check_exchange
from dmoe.config.rules.memory import explain_out_of_memory
from dmoe.config.schema import Config
from dmoe.distributed.accelerate_env import make_accelerator
from dmoe.distributed.collective_check import CollectiveChecker
from dmoe.distributed.data_parallel import (
    DataParallel,
    DDPStrategy,
    FSDPStrategy,
    broadcast_weights,
    make_grad_scaler,
)
from dmoe.distributed.expert_parallel import shard_experts
from dmoe.distributed.init import ProcessInfo
from dmoe.distributed.mesh import ParallelMesh, build_mesh, ranks_per_node
from dmoe.distributed.placement.copy_cost import measure_break_even
from dmoe.distributed.placement.moves import PeriodicPlacement
from dmoe.models.base import Model, ModelOutput, check_own_model
from dmoe.moe.copy_planner import CopyRule
from dmoe.moe.kernels import check_kernels
from dmoe.moe.rng import generator
from dmoe.observability.profiler import DTYPES
from dmoe.train.modular.attach import (
    attach_modules,
    initialize_modules,
    select_trainable_parameters,
)
from dmoe.train.optimizer import build_optimizer
from dmoe.train.tasks import Task, task_of

DATA_PARALLEL: dict[str, Callable[[nn.Module, ParallelMesh, Accelerator], DataParallel]] = {
    "ddp": DDPStrategy,
    "fsdp": FSDPStrategy,
}


@dataclass
class Engine:
    """Everything that an optimizer step needs."""

    config: Config
    process: ProcessInfo
    mesh: ParallelMesh
    batching: Batching
    precision: str
    accelerator: Accelerator
    task: Task
    model: Model
    """Without autocast and data parallelism: for parameter names, weights and MoE layers."""
    data_parallel: DataParallel
    """DDP or FSDP2 for the parameters that the ranks hold in common: `parallel.mode`."""
    optimizer: torch.optim.Optimizer
    collective_checker: CollectiveChecker | None
    """Compares the ranks' all-to-alls, if `debug.collectives`."""
    own_model: str | None = None
    """Class of the user's model; None for that of the config."""
    placement: PeriodicPlacement | None = None
    """Moves experts; None where they stay: `parallel.placement.kind=fixed`, or EP = 1."""

    @property
    def wrapped_model(self) -> nn.Module:
        """The model to call: under autocast, and in DDP or FSDP2 if there are other ranks."""
        return self.data_parallel.wrapped

    @property
    def sequences_per_forward(self) -> int:
        """Sequences per forward of this process: the micro-batches of its virtual ranks."""
        return self.batching.micro_batch * self.config.parallel.virtual_ranks

    @property
    def targets_per_step(self) -> int:
        """Targets of the global batch, by which the loss is divided if all are predicted."""
        return self.config.train.global_batch * self.task.targets_per_sample

    def contiguous_experts(self) -> AbstractContextManager[None]:
        """Have all experts in contiguous runs inside, the order of a checkpoint. Collective."""
        return nullcontext() if self.placement is None else self.placement.contiguous()

    def close(self) -> None:
        self.accelerator.free_memory()


def build_engine(
    config: Config,
    process: ProcessInfo,
    num_outputs: int,
    dtype: torch.dtype = torch.float32,
    model: Model | None = None,
    is_trained: bool = True,
) -> Engine:
    """Build, shard, initialize and wrap the model, in this order. Collective over all ranks.

    So no rank ever holds an expert of another rank.

    Args:
        config: the whole config.
        process: rank and device of this process.
        num_outputs: vocabulary size, or number of classes.
        dtype: of the parameters; float64 is for `dmoe verify`.
        model: one to train in place of the config's, with its weights.
        is_trained: False for an engine that only evaluates: no warm-up, so no gradients.
    """
    precision = resolve_precision(config.train.precision, process.device, config.model.dim)
    check_exchange(config, precision)
    if is_trained:
        check_kernels(config.moe.kernels, process.device)
    ep, device = expert_parallel(config, process.world_size), process.device
    node_size = ranks_per_node(config.parallel.exchange, ep, process.host_size, device)
    mesh = build_mesh(ep, device, config.parallel.start_timeout, node_size)
    checker = (
        CollectiveChecker(mesh.ep_group, config.parallel.timeout)
        if config.debug.collectives and mesh.ep_group
        else None
    )
    task = task_of(config, num_outputs)
    placement = config.parallel.placement
    copies = CopyRule.of(placement.copies, placement.break_even)
    own_model = None if model is None else type(model).__qualname__
    if model is None:
        model = _build_model(task, mesh, checker, process, dtype, copies)
    else:
        check_own_model(model, config)
        shard_experts(model, mesh, checker, copies=copies, exchange=config.parallel.exchange)
        model.to(process.device)
    model.offload = offloads(config, process.device)
    broadcast_weights(model, mesh)
    if placement.copies == "auto" and placement.break_even is None:
        recompute = config.train.recompute in ("experts", "block")
        rows = measure_break_even(model, mesh, DTYPES[precision], recompute)
        if rows is not None:
            model.notes = (
                *model.notes,
                f"copies: one pays from {rows:,} rows on, as measured; "
                f"parallel.placement.break_even={rows} repeats this run bit for bit",
            )
    accelerator = make_accelerator(process, precision)
    if precision == "fp16":
        accelerator.scaler = make_grad_scaler(mesh, process.device)
    data_parallel = DATA_PARALLEL[config.parallel.mode](model, mesh, accelerator)
    optimizer = accelerator.prepare_optimizer(
        build_optimizer(model, config.optim, ep_rank=mesh.ep_rank, seed=config.train.seed)
    )
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
        own_model,
    )
    periodic, layers = config.parallel.placement, model.moe_layers()
    if periodic.kind == "periodic" and mesh.ep > 1 and layers:
        engine.placement = PeriodicPlacement(periodic, layers, optimizer, mesh, process.host_size)
    if is_trained:
        warm_up(engine)
    return engine


def warm_up(engine: Engine) -> None:
    """Use every communicator once, before the first step; see `_warm_up`. Collective.

    Raises:
        ConfigError: a step does not fit into the memory.
    """
    with explain_out_of_memory(engine.config, engine.process.world_size, "batch"):
        _warm_up(engine)


def _warm_up(engine: Engine) -> None:
    """Run one forward and backward on random samples and discard the gradients.

    Random, as on equal samples all tokens of all ranks would go to the same K experts, whose ranks
    would need up to E / K times the memory of a step.

    So every communicator is first used under the timeout of the start. And DDP orders its buckets
    anew after its first backward; a ring all-reduce sums a number in an order that depends on its
    place in the bucket. Without this, the second step after a restart would round differently from
    the same step of the uninterrupted run on three ranks or more (measured: 1e-7 of the loss).
    """
    config, process = engine.config, engine.process
    random = generator(config.train.seed, "warm-up", process.rank)
    samples = engine.task.dummy_batch(engine.sequences_per_forward, random)
    input, target = samples.input.to(process.device), samples.target.to(process.device)
    context = samples.context(process.device, noise_key=(0, 0))
    with engine.data_parallel.grad_sync(last=True):
        output: ModelOutput = engine.wrapped_model(input, target, context)
        assert output.loss_sum is not None
        engine.accelerator.backward(output.loss_sum)
    engine.data_parallel.wait_for_grads()
    engine.optimizer.zero_grad()


def _build_model(
    task: Task,
    mesh: ParallelMesh,
    checker: CollectiveChecker | None,
    process: ProcessInfo,
    dtype: torch.dtype,
    copies: CopyRule | None,
) -> Model:
    config = task.config
    with torch.device("meta"):
        model = task.build_model(config.parallel.virtual_ranks, config.train.recompute)
        attach_modules(model, config, config.parallel.virtual_ranks)
    model = model.to(dtype)
    shard_experts(model, mesh, checker, copies=copies, exchange=config.parallel.exchange)
    model.to_empty(device=process.device)
    model.initialize(config.train.seed)
    initialize_modules(model, config)
    select_trainable_parameters(model, config)
    for layer in model.moe_layers():
        layer.pending_counts = None  # `update` in step.py moves the biases by the reduced counts
    return model


def offloads(config: Config, device: torch.device) -> bool:
    """Return whether blocks save for the backward in main memory.

    Raises ConfigError on a CPU, for activations and for moments.
    """
    for field, value, off, what in (
        ("train.offload", config.train.offload, "none", "activations"),
        ("optim.offload", config.optim.offload, False, "moments"),
    ):
        if value != off and device.type == "cpu":
            why = f"needs a GPU: on a CPU {what} are in main memory already"
            raise ConfigError(field, value, why, "leave it out")
    return config.train.offload == "activations"


MIN_BF16_DIM_ON_CPU = 512
"""Below this model width bf16 is slower than fp32 on a CPU: oneDNN compiles a kernel for each new
number of rows, and an expert's rows differ in every step. Measured on one thread with AMX, one
quickstart step: width 128 fp32 122 ms, bf16 264 ms; width 512 fp32 925 ms, bf16 654 ms."""


def resolve_precision(precision: str, device: torch.device, dim: int) -> str:
    """Return `fp32`, `bf16` or `fp16` for `auto`, `fp32`, `bf16` or `fp16`.

    Parameters and optimizer state are float32 in all of them; the precision is that of matrix
    products. `auto` is bf16 where the hardware multiplies it natively (CUDA from Ampere on, CPUs
    with amx_bf16 or avx512_bf16) and it is faster, which on a CPU takes a model width `dim` of
    512.
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
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if dim < MIN_BF16_DIM_ON_CPU:
        return "fp32"
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if native else "fp32"
