"""FSDP2: which modules are units, over which ranks each is sharded, and its workarounds."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard
from torch.utils._pytree import tree_map_only

from dmoe.distributed.expert_parallel import expert_parameters, moe_layers
from dmoe.distributed.mesh import ParallelMesh
from dmoe.moe.interfaces import ExpertLayer


def apply_fsdp(model: nn.Module, mesh: ParallelMesh, divisor: int = 1) -> None:
    """Replace the parameters by sharded DTensors, in place. No collective.

    Call it after `shard_experts` and the initialisation, before an optimizer sees the parameters.
    Units: the experts of each MoE layer (sharded over edp), each child of the topmost module lists
    (the blocks), and the root with the rest (both over all ranks). Experts without replicas
    (EDP = 1) stay plain tensors. Gradients are sums over the ranks, divided by `divisor`.
    """
    device_type = next(model.parameters()).device.type
    # A model without memory (`fake_world.py`) is sharded as on a CPU.
    device_type = "cpu" if device_type == "meta" else device_type
    world_mesh = _device_mesh(dist.group.WORLD, device_type)
    unsharded = set(expert_parameters(model).values())
    if mesh.edp_group is not None:
        edp_mesh, unsharded = _device_mesh(mesh.edp_group, device_type), set[nn.Parameter]()
        for layer in moe_layers(model):
            fully_shard(
                layer.experts,
                mesh=edp_mesh,
                shard_placement_fn=lambda p: Shard(shard_dim(p.shape, mesh.edp)),
            )
    for block in blocks(model):
        block.register_forward_hook(_own_memory)
        fully_shard(block, mesh=world_mesh, ignored_params=unsharded)
    model.register_forward_hook(_own_memory)
    fully_shard(model, mesh=world_mesh, ignored_params=unsharded)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(float(divisor))
            # A factor alone still asks for PREMUL_SUM, which gloo does not have.
            module.set_force_sum_reduction_for_comms(True)
    model.register_forward_hook(_reshard_root)
    prefetch([unit for unit in blocks(model) if isinstance(unit, FSDPModule)])


def prefetch(units: list[FSDPModule]) -> None:
    """Let each block gather the next one, and its experts, before it computes.

    FSDP2 gathers a block when its forward begins, which a GPU's host reaches only after the host
    read of the block before. In the backward the block before, likewise.
    """
    for unit, after in pairwise(units):
        unit.set_modules_to_forward_prefetch(_nested(after))
        after.set_modules_to_backward_prefetch(_nested(unit))


def _nested(unit: FSDPModule) -> list[FSDPModule]:
    """Return a unit and those inside, its experts."""
    return [part for part in cast(nn.Module, unit).modules() if isinstance(part, FSDPModule)]


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the children of the topmost module lists that are not part of an MoE layer."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif not isinstance(child, ExpertLayer):
            yield from blocks(child)


def shard_dim(shape: torch.Size, num_shards: int) -> int:
    """Return the first dimension that `num_shards` divides, else 0 (FSDP2 shards only 0 unevenly).

    For experts [e, D, H]: whole experts where there are enough of them (no copy around the
    collectives), else slices of each expert.
    """
    return next((dim for dim, size in enumerate(shape) if size % num_shards == 0), 0)


def _own_memory(module: nn.Module, inputs: object, output: object) -> object:
    """Copy outputs that are views, before FSDP2 hooks its backward to them.

    An in-place operation on a view (`out += x`) would drop that hook without an error, and with it
    the all-gather of the backward.
    """
    return tree_map_only(Tensor, lambda t: t if t._base is None else t.clone(), output)


def _reshard_root(model: nn.Module, inputs: object, output: object) -> None:
    """Reshard the root after a forward without backward.

    FSDP2 keeps the root gathered for its backward; without one, `model.parameters()` would return
    other tensors than the optimizer's.
    """
    if not torch.is_grad_enabled():
        cast(FSDPModule, model).reshard()


def _device_mesh(group: dist.ProcessGroup | None, device_type: str) -> DeviceMesh:
    """One-dimensional DeviceMesh over a communicator that `build_mesh` created and used."""
    assert group is not None
    device_mesh: Any = DeviceMesh.from_group(group, device_type)
    return cast(DeviceMesh, device_mesh)
