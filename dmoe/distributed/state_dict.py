"""A training state as named tensors: what a checkpoint holds, the same names at any world, EP size and mode.

Dense parameters are plain tensors, equal on all ranks; under FSDP2, DTensors over all ranks. Experts are DTensors of global shape
[E, ...], Shard(0) over the ranks of a row and, down the columns, replicated (DDP) or sharded once more (FSDP2), so that a checkpoint
written by 4 ranks is read by 1 or 8, in either mode, and every expert finds itself by its global id. Names: `model.NAME`,
`optim.exp_avg.NAME`, `optim.exp_avg_sq.NAME`, `optim.step`.

Experts of different shape cannot be stacked. Each of their matrices is a tensor of its own, named by the global id, on the column of
ranks that have it; the other ranks know its name and shape and hold nothing of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._prims_common import make_contiguous_strides_for
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from dmoe.distributed.expert_parallel import (
    ExpertLocation,
    expert_buffers,
    expert_locations,
    expert_parameters,
)
from dmoe.distributed.gradients import local_tensor
from dmoe.distributed.mesh import ParallelMesh

MOMENTS = ("exp_avg", "exp_avg_sq")


def model_state(model: nn.Module, mesh: ParallelMesh) -> dict[str, Tensor]:
    """Every parameter and persistent buffer by name; the tensors share memory with the model, so loading into them loads the model."""
    experts, homes = {*expert_parameters(model), *expert_buffers(model)}, expert_locations(model)
    mesh = _mesh(mesh, _device_type(model))
    own = {name: value.detach() for name, value in model.state_dict(keep_vars=True).items()}
    whole = {
        n: _whole(value, mesh) if n in experts else value
        for n, value in own.items()
        if n not in homes
    }
    whole |= {
        name: _at_home(own.get(name), home, mesh, _device_type(model))
        for name, home in homes.items()
    }
    return {f"model.{name}": value for name, value in whole.items()}


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, mesh: ParallelMesh
) -> dict[str, Tensor]:
    """AdamW's moments by parameter name, and the one step count all parameters share. Made (as zeros) where the optimizer has not
    stepped yet, so that a checkpoint can be loaded into it."""
    experts, homes, mesh = (
        expert_parameters(model),
        _trained_homes(model),
        _mesh(mesh, _device_type(model)),
    )
    own: dict[str, dict[str, Tensor]] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state: dict[str, Tensor] = {}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        name, moments = names[id(parameter)], _moments(optimizer, parameter)
        own[name] = moments
        for moment in MOMENTS if name not in homes else ():
            state[f"optim.{moment}.{name}"] = (
                _whole(moments[moment], mesh) if name in experts else moments[moment]
            )
        steps = state.setdefault("optim.step", moments["step"])
        assert torch.equal(steps, moments["step"]), (
            "parameters of one optimizer have stepped differently often"
        )
    for name, home in homes.items():
        for moment in MOMENTS:
            value = own[name][moment] if name in own else None
            state[f"optim.{moment}.{name}"] = _at_home(value, home, mesh, _device_type(model))
    return state


def _trained_homes(model: nn.Module) -> dict[str, ExpertLocation]:
    """Of a layer with experts of different shape either all are trained or none, and every rank has one of them."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    layers = {name.rpartition(".experts.")[0] for name in frozen}
    return {
        name: home
        for name, home in expert_locations(model).items()
        if name.rpartition(".experts.")[0] not in layers
    }


def set_optimizer_step(optimizer: torch.optim.Optimizer, step: Tensor) -> None:
    """Give every parameter the step count that was loaded into `optim.step`, each a tensor of its own."""
    for moments in optimizer.state.values():
        moments["step"] = step.detach().clone()


def _moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state.update({moment: torch.zeros_like(parameter) for moment in MOMENTS})
    return state


def _device_type(model: nn.Module) -> str:
    return next(model.parameters()).device.type


def _mesh(topology: ParallelMesh, device: str) -> DeviceMesh | None:
    """The picture of topology.py as torch's mesh, over the groups that are there already; turned, because experts are divided along
    ep first and along edp after."""
    if topology.ep_group is None:
        return None
    ranks = torch.arange(topology.world_size).view(topology.edp, topology.ep).T
    if topology.edp_group is None:
        return DeviceMesh.from_group(
            topology.ep_group, device, ranks.flatten(), mesh_dim_names=("ep",)
        )
    return DeviceMesh.from_group(
        [topology.ep_group, topology.edp_group], device, ranks, mesh_dim_names=("ep", "edp")
    )


def _whole(experts: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """A rank's experts [e, ...] as their part of [E, ...]: split along ep; along edp as they are, equal or split."""
    if mesh is None:
        return experts
    shape = torch.Size([experts.shape[0] * mesh.size(0), *experts.shape[1:]])
    down = experts.placements if isinstance(experts, DTensor) else (Replicate(),)
    placements = [Shard(0), *down][: mesh.ndim]
    stride = make_contiguous_strides_for(shape)
    return DTensor.from_local(
        local_tensor(experts), mesh, placements, run_check=False, shape=shape, stride=stride
    )


def _at_home(
    value: Tensor | None, home: ExpertLocation, topology: ParallelMesh, device: str
) -> Tensor:
    """One expert's matrix as it lies on its column of ranks: equal copies, or as FSDP2 has split it. `value` is None elsewhere.

    The mesh is a list of ranks and no communicator: where a checkpoint's pieces lie is all that is asked of it.
    """
    if topology.ep_group is None or isinstance(value, DTensor):
        assert value is not None, "one rank of an EP group of one has every expert"
        return value
    column = list(range(home.ep_rank, topology.world_size, topology.ep))
    mesh = DeviceMesh(device, column, mesh_dim_names=("edp",), _init_backend=False)
    here = torch.empty(0, dtype=home.dtype, device=device) if value is None else local_tensor(value)
    shape, stride = torch.Size(home.shape), make_contiguous_strides_for(home.shape)
    return DTensor.from_local(
        here, mesh, [Replicate()], run_check=False, shape=shape, stride=stride
    )
