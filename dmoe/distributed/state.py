"""A training state as named tensors: what a checkpoint holds, the same names at any world, EP size and mode.

Dense parameters are plain tensors, equal on all ranks; under FSDP2, DTensors over all ranks. Experts are DTensors of global shape
[E, ...], Shard(0) over the ranks of a row and, down the columns, replicated (DDP) or sharded once more (FSDP2), so that a checkpoint
written by 4 ranks is read by 1 or 8, in either mode, and every expert finds itself by its global id. Names: `model.NAME`,
`optim.exp_avg.NAME`, `optim.exp_avg_sq.NAME`, `optim.step`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._prims_common import make_contiguous_strides_for
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from dmoe.distributed.gradients import local
from dmoe.distributed.parallelize import expert_parameters
from dmoe.distributed.topology import Topology

__all__ = ["model_state", "optimizer_state", "share_step"]

MOMENTS = ("exp_avg", "exp_avg_sq")


def model_state(model: nn.Module, topology: Topology) -> dict[str, Tensor]:
    """Every parameter and persistent buffer by name; the tensors share memory with the model, so loading into them loads the model."""
    experts, mesh = expert_parameters(model), _mesh(topology, _device_type(model))
    return {
        f"model.{name}": _whole(value.detach(), mesh) if name in experts else value.detach()
        for name, value in model.state_dict(keep_vars=True).items()
    }


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, topology: Topology) -> dict[str, Tensor]:
    """AdamW's moments by parameter name, and the one step count all parameters share. Made (as zeros) where the optimizer has not
    stepped yet, so that a checkpoint can be loaded into it."""
    experts, mesh = expert_parameters(model), _mesh(topology, _device_type(model))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state: dict[str, Tensor] = {}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        name, moments = names[id(parameter)], _moments(optimizer, parameter)
        for moment in MOMENTS:
            state[f"optim.{moment}.{name}"] = _whole(moments[moment], mesh) if name in experts else moments[moment]
        steps = state.setdefault("optim.step", moments["step"])
        assert torch.equal(steps, moments["step"]), "parameters of one optimizer have stepped differently often"
    return state


def share_step(optimizer: torch.optim.Optimizer, step: Tensor) -> None:
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


def _mesh(topology: Topology, device: str) -> DeviceMesh | None:
    """The picture of topology.py as torch's mesh, over the groups that are there already; turned, because experts are divided along
    ep first and along edp after."""
    if topology.exchange is None:
        return None
    ranks = torch.arange(topology.world).view(topology.edp, topology.ep).T
    if topology.copies is None:
        return DeviceMesh.from_group(topology.exchange, device, ranks.flatten(), mesh_dim_names=("ep",))
    return DeviceMesh.from_group([topology.exchange, topology.copies], device, ranks, mesh_dim_names=("ep", "edp"))


def _whole(experts: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """A rank's experts [e, ...] as their part of [E, ...]: split along ep; along edp as they are, equal or split."""
    if mesh is None:
        return experts
    shape = torch.Size([experts.shape[0] * mesh.size(0), *experts.shape[1:]])
    down = experts.placements if isinstance(experts, DTensor) else (Replicate(),)
    placements = [Shard(0), *down][: mesh.ndim]
    stride = make_contiguous_strides_for(shape)
    return DTensor.from_local(local(experts), mesh, placements, run_check=False, shape=shape, stride=stride)
