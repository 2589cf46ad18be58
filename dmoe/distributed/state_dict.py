"""Training state as named tensors for checkpoints, independent of world size, EP size and mode.

Names: `model.NAME`, `optim.MOMENT.NAME` and `optim.step`. Moments: AdamW `exp_avg`, `exp_avg_sq`;
Muon `momentum_buffer`.

Dense parameters are plain tensors, equal on all ranks; under FSDP2, DTensors over all ranks.
Expert stacks are DTensors of global shape [E, ...]: Shard(0) over the EP ranks of a row and, down
the column, replicated (DDP) or sharded again (FSDP2). So a checkpoint of 4 ranks loads on 1 or 8,
in either mode, and every expert is found by its global id.

Heterogeneous experts cannot be stacked. Each of their matrices is a tensor named by the expert's
global id, on the column of ranks that has it; other ranks know its name and shape but hold nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch._prims_common import make_contiguous_strides_for
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from dmoe.config.errors import ConfigError
from dmoe.distributed.expert_parallel import (
    ExpertLocation,
    expert_buffers,
    expert_locations,
    expert_parameters,
)
from dmoe.distributed.gradients import local_tensor
from dmoe.distributed.mesh import ParallelMesh

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of the parameters in a group that names no others."""


def model_state(model: nn.Module, mesh: ParallelMesh) -> dict[str, Tensor]:
    """Collect every parameter and persistent buffer by name.

    The tensors share memory with the model: loading into them loads the model. No collective.
    """
    experts = {*expert_parameters(model), *expert_buffers(model)}
    locations, device_type = expert_locations(model), _device_type(model)
    device_mesh = _expert_device_mesh(mesh, device_type)
    local = {name: value.detach() for name, value in model.state_dict(keep_vars=True).items()}
    state = {
        name: _stacked_experts(value, device_mesh) if name in experts else value
        for name, value in local.items()
        if name not in locations
    }
    state |= {
        name: _single_expert(local.get(name), location, mesh, device_type)
        for name, location in locations.items()
    }
    return {f"model.{name}": value for name, value in state.items()}


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, mesh: ParallelMesh
) -> dict[str, Tensor]:
    """Collect the moments by parameter name, and the step count that all parameters share.

    Before the first step the state is created (zeros), so that a checkpoint can be loaded into it.
    No collective.
    """
    experts, locations = expert_parameters(model), _trained_locations(model)
    device_type = _device_type(model)
    device_mesh = _expert_device_mesh(mesh, device_type)
    local: dict[str, dict[str, Tensor]] = {}
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has torch's
    if hasattr(inner, "allocate_moments"):  # all at once, on the host
        inner.allocate_moments()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state: dict[str, Tensor] = {}
    of_layer: dict[str, tuple[str, ...]] = {}
    for parameter, kinds, dtype in _with_moments(optimizer):
        name, moments = names[id(parameter)], _moments(optimizer, parameter, kinds, dtype)
        local[name], of_layer[_layer(name)] = moments, kinds
        for moment in kinds if name not in locations else ():
            value = moments[moment]
            state[f"optim.{moment}.{name}"] = (
                _stacked_experts(value, device_mesh) if name in experts else value
            )
        step = state.setdefault("optim.step", moments["step"])
        assert torch.equal(step, moments["step"]), (
            "parameters of one optimizer have different step counts"
        )
    for name, location in locations.items():
        for moment in of_layer[_layer(name)]:
            own_value = local[name][moment] if name in local else None
            state[f"optim.{moment}.{name}"] = _single_expert(own_value, location, mesh, device_type)
    return state


def _trained_locations(model: nn.Module) -> dict[str, ExpertLocation]:
    """Locate trained heterogeneous experts: a layer trains all or none, and every rank has one."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    frozen_layers = set(map(_layer, frozen))
    return {
        name: location
        for name, location in expert_locations(model).items()
        if _layer(name) not in frozen_layers
    }


def _layer(name: str) -> str:
    """Return the path of the layer whose expert a parameter belongs to."""
    return name.rpartition(".experts.")[0]


def _with_moments(
    optimizer: torch.optim.Optimizer,
) -> Iterator[tuple[nn.Parameter, tuple[str, ...], torch.dtype | None]]:
    """Yield every parameter with names and dtype of its moments; None: that of the parameter."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, group.get("moments", MOMENTS), group.get("moment_dtype")


def set_optimizer_step(optimizer: torch.optim.Optimizer, step: Tensor) -> None:
    """Copy the loaded `optim.step` to every parameter, each as its own tensor."""
    for moments in optimizer.state.values():
        moments["step"] = step.detach().clone()


def _moments(
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    kinds: tuple[str, ...],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state.update({moment: torch.zeros_like(parameter, dtype=dtype) for moment in kinds})
    if {*state} != {"step", *kinds}:
        allowed = f"keeps {', '.join(sorted(state))}, not step and MOMENTS ({', '.join(kinds)})"
        fix = "a checkpoint must know what to save; see docs/plugins.md"
        raise ConfigError("optim.kind", type(optimizer).__name__, allowed, fix)
    return state


def _device_type(model: nn.Module) -> str:
    return next(model.parameters()).device.type


def _expert_device_mesh(mesh: ParallelMesh, device_type: str) -> DeviceMesh | None:
    """The picture in mesh.py as torch's DeviceMesh, over the existing groups; None with EP = 1.

    Transposed to (ep, edp), because experts are divided along ep first, then along edp.
    """
    if mesh.ep_group is None:
        return None
    ranks = torch.arange(mesh.world_size).view(mesh.edp, mesh.ep).T
    if mesh.edp_group is None:
        return DeviceMesh.from_group(
            mesh.ep_group, device_type, ranks.flatten(), mesh_dim_names=("ep",)
        )
    return DeviceMesh.from_group(
        [mesh.ep_group, mesh.edp_group], device_type, ranks, mesh_dim_names=("ep", "edp")
    )


def _stacked_experts(experts: Tensor, device_mesh: DeviceMesh | None) -> Tensor:
    """A rank's experts [e, ...] as part of [E, ...]: sharded along ep, along edp as they are."""
    if device_mesh is None:
        return experts
    shape = torch.Size([experts.shape[0] * device_mesh.size(0), *experts.shape[1:]])
    edp_placements = experts.placements if isinstance(experts, DTensor) else (Replicate(),)
    placements = [Shard(0), *edp_placements][: device_mesh.ndim]
    return as_dtensor(local_tensor(experts), device_mesh, placements, shape)


def _single_expert(
    value: Tensor | None, location: ExpertLocation, mesh: ParallelMesh, device_type: str
) -> Tensor:
    """One expert's matrix on its column of ranks: replicated, or as FSDP2 has sharded it.

    `value` is None on the other ranks. The mesh is a list of ranks without a communicator: a
    checkpoint only asks which rank has which part.
    """
    if mesh.ep_group is None or isinstance(value, DTensor):
        assert value is not None, "with EP = 1 every rank has every expert"
        return value
    column = list(range(location.ep_rank, mesh.world_size, mesh.ep))
    device_mesh = DeviceMesh(device_type, column, mesh_dim_names=("edp",), _init_backend=False)
    if value is None:
        local = torch.empty(0, dtype=location.dtype, device=device_type)
    else:
        local = local_tensor(value)
    return as_dtensor(local, device_mesh, [Replicate()], torch.Size(location.shape))


def as_dtensor(
    local: Tensor, device_mesh: DeviceMesh, placements: Sequence[Placement], shape: torch.Size
) -> DTensor:
    """Return the DTensor of global shape `shape` of which `local` is this rank's part.

    They share memory. `DTensor.from_local` would move a moment that is on the host to the GPU.
    """
    meta = TensorMeta(shape, make_contiguous_strides_for(shape), local.dtype)
    spec = DTensorSpec(device_mesh, tuple(placements), tensor_meta=meta)
    return DTensor(local.detach(), spec, requires_grad=False)
