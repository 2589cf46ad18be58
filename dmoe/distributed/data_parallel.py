"""Data parallelism: DDP or FSDP2 for the dense parameters, and for the replicas of each expert.

DDP: every rank holds all dense parameters in full, and its own experts in full. DDP must not touch
the experts; `ExpertGradients` sums their gradients.

FSDP2: a parameter is sharded over the ranks that would hold equal copies of it under DDP, and
all-gathered before use. Eight ranks, EP = 4 (the picture in mesh.py), two experts per rank:

    experts     ranks 0 and 4 hold halves of experts 0 1, ranks 1 and 5 of experts 2 3, ...: edp
    the rest    every rank holds an eighth

A unit (the experts of a layer, a block, the root) is all-gathered before its forward and again
before its backward, and its gradients are reduce-scattered: 1.5 times the bytes of DDP's
all-reduce, for 1/W of the memory of weights, gradients and moments.

Gradients are sums in both modes. FSDP2 by default divides by the number of ranks that share a
parameter; that number is EP times smaller for experts, so the two would differ by a factor of EP.
FSDP2 gathers weights in their own dtype (float32) and autocast converts them, exactly as under DDP.
"""

# No `from __future__ import annotations`: DDP compares the hook's annotations with the types.

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel

from dmoe.config.errors import ConfigError
from dmoe.config.launch_env import refuse_debug_detail
from dmoe.distributed.expert_parallel import expert_buffers, expert_parameters
from dmoe.distributed.fsdp import apply_fsdp
from dmoe.distributed.gradients import DenseGradients, ExpertGradients
from dmoe.distributed.mesh import ParallelMesh


class DataParallel(Protocol):
    """Replication or sharding of parameters, and the sums of their gradients, over the ranks.

    Implemented by `DDPStrategy`, `FSDPStrategy` and `PlainStrategy`.

    Made after `shard_experts` and the initialisation of the weights, and before the optimizer,
    since it may replace parameters. Collective over all ranks. `average`: gradients are means over
    the ranks, complete when the backward ends (`parallel_model`); else sums, after
    `wait_for_grads`. `accelerator`: puts the model under autocast.
    """

    wrapped: nn.Module
    """The callable model, under autocast."""

    def grad_sync(self, last: bool) -> AbstractContextManager[None]:
        """Context of one forward and backward; gradients are summed in the `last` of a step."""
        ...

    def wait_for_grads(self) -> None:
        """Wait for the sums: then every `grad` is the gradient of the global batch's loss."""
        ...


class DDPStrategy:
    """`DataParallel` by DDP; one process has nothing to sum and keeps the model as it is."""

    def __init__(
        self,
        model: nn.Module,
        mesh: ParallelMesh,
        accelerator: Accelerator | None = None,
        *,
        average: bool = False,
    ) -> None:
        self.wrapped = model
        if accelerator is not None:
            # accelerate's "evaluation mode" only adds autocast around the forward. It wraps in DDP
            # by the number of processes on GPUs, and always on CPUs.
            self.wrapped = accelerator.prepare_model(model, evaluation_mode=True)
        self.ddp: DistributedDataParallel | None = None
        # DDP refuses a model without trainable dense parameters.
        if mesh.world_size > 1 and any(p.requires_grad for p in dense_parameters(model)):
            if dist.get_backend() == "gloo":
                refuse_debug_detail()
            exclude_experts_from_ddp(model)
            # A gradient is a view of its bucket: 4 bytes less for each dense parameter. The first
            # check of shapes reads memory, which the tensors of `fake_world.py` do not have.
            self.ddp = DistributedDataParallel(
                model, gradient_as_bucket_view=True, init_sync=dist.get_backend() != "fake"
            )
            check_experts_excluded(self.ddp)
            if not average:
                sum_dense_gradients(self.ddp)
            self.wrapped = self.ddp
        self.expert_gradients = ExpertGradients(model, mesh, average)

    def grad_sync(self, last: bool) -> AbstractContextManager[None]:
        """Context of one forward and backward; gradients are summed in the `last` of a step."""
        self.expert_gradients.enable_sync(last)
        return nullcontext() if last or self.ddp is None else self.ddp.no_sync()

    def wait_for_grads(self) -> None:
        """Wait for the expert sums; DDP's own end with the backward."""
        self.expert_gradients.wait_for_grads()


def broadcast_weights(model: nn.Module, mesh: ParallelMesh) -> None:
    """Copy parameters and buffers from the first of the ranks that hold them to the others.

    Every rank draws its weights on its own CPU. Hosts with other vector units may draw other last
    bits, and then replicas train apart: DDP only broadcasts what it sums, which is neither the
    experts nor anything frozen. Collective over all ranks: one broadcast per tensor.
    """
    if mesh.world_size == 1:
        return
    of_experts = {*expert_parameters(model), *expert_buffers(model)}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        group = mesh.edp_group if name in of_experts else dist.group.WORLD
        if group is not None:
            dist.broadcast(tensor.detach(), group=group, group_src=0)


def exclude_experts_from_ddp(model: nn.Module) -> None:
    """Exclude experts and buffers from DDP. Call on the root module, before DDP wraps it.

    Experts are not replicas: otherwise DDP broadcasts rank 0's experts over all others and averages
    the gradients of different experts, without an error since the shapes are equal. Buffers (router
    biases) are computed from the same counts on every rank; DDP would broadcast them per forward.

    DDP has no public option yet (pytorch/pytorch#43690); remove this when there is one.
    """
    buffers = [name for name, _ in model.named_buffers()]
    ignored = [*expert_parameters(model), *buffers]
    model._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]


def dense_parameters(model: nn.Module) -> list[nn.Parameter]:
    """List the parameters that are not an expert's."""
    experts = set(expert_parameters(model))
    return [parameter for name, parameter in model.named_parameters() if name not in experts]


def sum_dense_gradients(ddp: DistributedDataParallel) -> None:
    """Make DDP sum gradients over the ranks instead of averaging.

    The loss is already divided by the global number of targets, so the sum over ranks *is* the
    gradient. A division during communication is avoided: gloo has no AVG, and bf16 PREMUL_SUM on
    NCCL has lost gradients.
    """
    ddp.register_comm_hook(None, _sum_hook)


def check_experts_excluded(ddp: DistributedDataParallel) -> None:
    """Assert that DDP reduces no expert."""
    experts = {id(parameter) for parameter in expert_parameters(ddp.module).values()}
    reduced = {
        id(p) for name, p in ddp.module.named_parameters() if name not in ddp.parameters_to_ignore
    }
    assert not experts & reduced, (
        "expert parameters are inside DDP: they would be overwritten by rank 0's"
    )


def _sum_hook(state: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    buffer = bucket.buffer()
    work = dist.all_reduce(buffer, async_op=True)
    assert work is not None
    # torch's fake back-end returns no value
    return work.get_future().then(  # type: ignore[no-any-return]
        lambda future: (future.value() or [buffer])[0]
    )


class FSDPStrategy:
    """`DataParallel` by FSDP2; one process has nothing to shard and keeps the model as it is."""

    def __init__(
        self,
        model: nn.Module,
        mesh: ParallelMesh,
        accelerator: Accelerator | None = None,
        *,
        average: bool = False,
    ) -> None:
        self.wrapped = model
        if mesh.world_size > 1:
            if accelerator is not None and accelerator.scaler is not None:
                why = (
                    "does not work with parallel.mode=fsdp: torch's loss scaler refuses gradients"
                    " on different meshes"
                )
                raise ConfigError("train.precision", "fp16", why, "use bf16, or parallel.mode=ddp")
            apply_fsdp(model, mesh, mesh.world_size if average else 1)
            if average:
                ExpertGradients(model, mesh, average)  # of experts without replicas
        if accelerator is not None:
            # accelerate has no FSDP2 on CPU and would wrap the model in DDP. Its "evaluation mode"
            # only adds autocast around the forward.
            self.wrapped = accelerator.prepare_model(
                model, device_placement=False, evaluation_mode=True
            )

    def grad_sync(self, last: bool) -> AbstractContextManager[None]:
        """Reduce gradients in the `last` backward; until then each rank keeps them in full."""
        if isinstance(self.wrapped, FSDPModule):
            self.wrapped.set_requires_gradient_sync(last)
        return nullcontext()

    def wait_for_grads(self) -> None:
        """Do nothing: the backward itself ends with the last reduction."""


class PlainStrategy:
    """`DataParallel` without a wrapper: the model is called as it is, and gradients averaged."""

    def __init__(self, model: nn.Module, mesh: ParallelMesh) -> None:
        self.wrapped = model
        self.expert_gradients = ExpertGradients(model, mesh, average=True)
        self.dense_gradients = DenseGradients(dense_parameters(model), mesh)

    def grad_sync(self, last: bool) -> AbstractContextManager[None]:
        """Context of one forward and backward; gradients are averaged in the `last` of a step."""
        self.expert_gradients.enable_sync(last)
        self.dense_gradients.sync_enabled, self.dense_gradients.scheduled = last, False
        return nullcontext()

    def wait_for_grads(self) -> None:
        """Do nothing: the backward itself ends with the reductions."""


def make_grad_scaler(mesh: ParallelMesh, device: torch.device) -> torch.amp.GradScaler:
    """Make the fp16 gradient scaler, with "found inf" reduced over all ranks.

    Experts differ between ranks, so an overflow can occur on one rank only; torch's plain
    GradScaler would skip the step and lower the scale there only, and the replicas would diverge.
    """
    if mesh.control_group is None:
        return torch.amp.GradScaler(device.type)
    return ShardedGradScaler(device.type, process_group=mesh.control_group)


def scaler_numbers(state: Mapping[str, Any]) -> dict[str, float]:
    """Return a gradient scaler's state as JSON numbers: scale, growth, good steps seen."""
    return {
        key: value.item() if isinstance(value, torch.Tensor) else value
        for key, value in state.items()
    }
