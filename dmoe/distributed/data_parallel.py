"""DDP for everything but the experts: what it must not touch, and that it sums where it would average.

Every rank holds all dense parameters whole, and its experts whole; `ExpertGradients` sums what DDP leaves alone.

FSDP2: every parameter lies in parts on the ranks that would hold equal copies of it under DDP, and is put together to be used.

Eight ranks, EP = 4 (the picture of topology.py), two experts a rank:

    experts     rank 0 and 4 hold halves of experts 0 1, rank 1 and 5 of experts 2 3, ...: sharded down the column (edp)
    all else    every rank holds an eighth

A unit (the experts of a layer, a block, the root) is gathered before its forward and again before its backward, and its gradients
are reduce-scattered after it: half as many bytes again as DDP's all-reduce, for 1/W of the memory of weights, gradients and moments.
Gradients are sums, as everywhere: FSDP2 by default divides by the number of ranks that share a parameter, which is another one
for experts than for the rest, so the two would differ by a factor of EP.

Weights are gathered in their own dtype (float32) and cast by autocast, exactly as under DDP, so that the numbers are DDP's.

fp16 loss scaling that every rank changes alike.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from dmoe.config.errors import ConfigError
from dmoe.distributed.expert_parallel import expert_parameters, moe_layers
from dmoe.distributed.gradients import ExpertGradients
from dmoe.distributed.mesh import ParallelMesh

# No `from __future__ import annotations`: DDP compares the hook's annotations with the types themselves.


class DDPStrategy:
    """`parallelize.Replication` by DDP, as accelerate wraps it; without a process group, accelerate's model alone."""

    def __init__(self, model: nn.Module, mesh: ParallelMesh, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        exclude_experts_from_ddp(model)
        # DDP refuses a model in which it has nothing to sum; then it is accelerate's model alone ("evaluation mode").
        nothing = not any(p.requires_grad for p in dense_parameters(model))
        self.wrapped: nn.Module = accelerator.prepare_model(model, evaluation_mode=nothing)
        if dist.is_initialized() and not nothing:
            sum_dense_gradients(self.wrapped)
        self.expert_gradients = ExpertGradients(model, mesh)

    def grad_sync(self, last: bool) -> AbstractContextManager[None]:
        self.expert_gradients.enable_sync(last)
        return nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def wait_for_grads(self) -> None:
        self.expert_gradients.wait_for_grads()


def exclude_experts_from_ddp(model: nn.Module) -> None:
    """Tell DDP what it must not touch. Must be set on the root module, before DDP wraps it.

    That is the experts, which are not replicas, and the buffers (the routers' biases), which every rank computes from the same
    counts: DDP would broadcast them in every forward.

    Without this, DDP also broadcasts rank 0's experts over all others and then averages the gradients of different experts: equal
    shapes, no error. There is no public way yet (pytorch/pytorch#43690 asks for one); remove when there is.
    """
    buffers = [name for name, _ in model.named_buffers()]
    model._ddp_params_and_buffers_to_ignore = [*expert_parameters(model), *buffers]  # type: ignore[assignment]


def dense_parameters(model: nn.Module) -> list[nn.Parameter]:
    experts = set(expert_parameters(model))
    return [parameter for name, parameter in model.named_parameters() if name not in experts]


def sum_dense_gradients(ddp: nn.Module) -> None:
    """Make DDP sum gradients over the ranks, where it would average them, and prove that no expert is among them.

    The loss is already divided by the global number of tokens, so the sum over ranks *is* the gradient. Division on the wire is
    avoided besides: gloo has no AVG, and bf16 PREMUL_SUM on NCCL has lost gradients.
    """
    assert isinstance(ddp, DistributedDataParallel), f"expected DDP, got {type(ddp).__name__}"
    experts = {id(parameter) for parameter in expert_parameters(ddp.module).values()}
    reduced = {
        id(p) for name, p in ddp.module.named_parameters() if name not in ddp.parameters_to_ignore
    }
    assert not experts & reduced, (
        "an expert's parameters are inside DDP: they would be overwritten by rank 0's"
    )
    ddp.register_comm_hook(None, _sum)


def _sum(state: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])  # type: ignore[no-any-return]


class FSDPStrategy:
    """`parallelize.Replication` by FSDP2. One process has nothing to shard: there the model stays as it is."""

    def __init__(self, model: nn.Module, mesh: ParallelMesh, accelerator: Accelerator) -> None:
        if mesh.world_size > 1:
            if accelerator.scaler is not None:
                why = "does not work with parallel.mode=fsdp: torch's loss scaler refuses gradients on different meshes"
                raise ConfigError("train.precision", "fp16", why, "use bf16, or parallel.mode=ddp")
            apply_fsdp(model, mesh)
        # accelerate has no FSDP2 on CPU and would put the model inside DDP. "evaluation mode" is only autocast around its forward.
        self.wrapped: nn.Module = accelerator.prepare_model(
            model, device_placement=False, evaluation_mode=True
        )

    def grad_sync(self, last: bool) -> AbstractContextManager[None]:
        """Until the `last` backward the gradients stay whole and unreduced on their rank (the memory of DDP's gradients)."""
        if isinstance(self.wrapped, FSDPModule):
            self.wrapped.set_requires_gradient_sync(last)
        return nullcontext()

    def wait_for_grads(self) -> None:
        """Nothing: backward itself ends with the last reduction."""


def apply_fsdp(model: nn.Module, topology: ParallelMesh) -> None:
    """Make DTensors of the parameters, in place: before an optimizer sees them, after `shard_experts` and initialisation.

    Units are the experts of each MoE layer (over the copies of an expert), each member of the model's module lists (its blocks) and
    the root with what is left (both over all ranks). Experts without copies stay plain tensors. No collective.
    """
    device = next(model.parameters()).device.type
    everyone, whole = _mesh(dist.group.WORLD, device), set(expert_parameters(model).values())
    if topology.edp_group is not None:
        column, whole = _mesh(topology.edp_group, device), set[nn.Parameter]()
        for layer in moe_layers(model):
            fully_shard(
                layer.experts,
                mesh=column,
                shard_placement_fn=lambda p: Shard(shard_dim(p.shape, topology.edp)),
            )
    for blocks in (child for child in model.children() if isinstance(child, nn.ModuleList)):
        for block in blocks:
            fully_shard(block, mesh=everyone, ignored_params=whole)
    fully_shard(model, mesh=everyone, ignored_params=whole)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(
                True
            )  # gloo has no PREMUL_SUM, which 1.0 would still ask for
    model.register_forward_hook(_put_root_away)


def shard_dim(shape: torch.Size, parts: int) -> int:
    """The first dimension that `parts` divides, else 0: FSDP2 can leave ranks with less, or nothing, in dimension 0 only.

    Of experts [e, D, H]: whole experts where there are enough of them (no copy around the collectives), else slices of each.
    """
    return next((dim for dim, size in enumerate(shape) if size % parts == 0), 0)


def _put_root_away(model: nn.Module, given: object, output: object) -> None:
    """FSDP2 keeps the root gathered for its backward. Where none follows, `model.parameters()` would be another set of tensors."""
    if not torch.is_grad_enabled():
        cast(FSDPModule, model).reshard()


def _mesh(group: dist.ProcessGroup | None, device: str) -> DeviceMesh:
    """The ranks of a communicator that is there already, and has been used (topology.py), in one dimension."""
    assert group is not None
    mesh: Any = DeviceMesh.from_group(group, device)
    return cast(DeviceMesh, mesh)


def make_grad_scaler(topology: ParallelMesh, device: torch.device) -> torch.amp.GradScaler:
    """A gradient scaler whose "found inf" is reduced over all ranks.

    With experts on different ranks an overflow can be one rank's alone; torch's plain GradScaler would skip the step and lower
    the scale there only, and the replicas would part without a word.
    """
    if topology.control_group is None:
        return torch.amp.GradScaler(device.type)
    return ShardedGradScaler(device.type, process_group=topology.control_group)
