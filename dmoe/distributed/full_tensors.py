"""Full (unsharded) tensors of a distributed model, for comparing runs and for `ParallelModel`.

Independent of `state_dict.py` on purpose: `dmoe verify` checks checkpoints with this module, so it
must not share their mistakes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dmoe.config.errors import ConfigError
from dmoe.distributed.coalesced import broadcast_experts, gather_stacks, unsharded
from dmoe.distributed.expert_parallel import (
    ExpertLocation,
    expert_buffers,
    expert_locations,
    expert_parameters,
)
from dmoe.distributed.gradients import local_tensor
from dmoe.distributed.mesh import ParallelMesh


def gather_full(
    values: Mapping[str, Tensor],
    experts: set[str],
    mesh: ParallelMesh,
    locations: Mapping[str, ExpertLocation] | None = None,
) -> dict[str, Tensor]:
    """Gather every tensor in full, on every rank.

    Cost per dtype and 32 MiB: one all-gather of sharded tensors, one of expert stacks over the EP
    group, and one broadcast per EP rank of its matrices of `locations` (`coalesced.py`).

    Args:
        values: this rank's tensors by name, all of its own experts' among them, or none at all.
        experts: names of the expert stacks [e, ...].
        mesh: the ranks.
        locations: `expert_locations` of the model: the matrices that exist on one EP rank only.

    Returns:
        Full tensors by name; expert stacks as [E, ...] in global order.
    """
    locations = locations or {}
    full = broadcast_experts(values, locations, mesh) if values else {}
    rest = unsharded({name: value for name, value in values.items() if name not in locations})
    stacks = {name: value for name, value in rest.items() if name in experts}
    return full | rest | gather_stacks(stacks, mesh)


def full_state(model: nn.Module, mesh: ParallelMesh) -> dict[str, Any]:
    """Return the state of the model on one process, on the CPU of each rank. Collective.

    One tensor at a time, so that a GPU never holds more than one full tensor (of experts of
    different shapes: those of all).
    """
    experts = {*expert_parameters(model), *expert_buffers(model)}
    locations = expert_locations(model)
    local = model.state_dict(keep_vars=True)
    full = {
        name: gather_full({name: value}, experts, mesh)[name].cpu().clone()
        if isinstance(value, Tensor)
        else value
        for name, value in local.items()
        if name not in locations
    }
    single = {name: value for name, value in local.items() if name in locations}
    return full | {
        name: value.cpu().clone()
        for name, value in gather_full(single, set(), mesh, locations).items()
    }


def load_full_state(model: nn.Module, mesh: ParallelMesh, state: Mapping[str, Any]) -> None:
    """Fill this rank's part of the model from `full_state`, or the state of one process.

    No collective.

    Raises:
        ConfigError: a name is missing, unknown or of another shape; nothing is changed then.
    """
    locations = expert_locations(model)
    stacks = {*expert_parameters(model), *expert_buffers(model)} - locations.keys()
    local = _tensors(model.state_dict(keep_vars=True))
    given, fix = _tensors(state), "load the state of the same model"
    for name in sorted(given.keys() ^ (local.keys() | locations.keys())):
        where = "the state" if name in given else "the model"
        raise ConfigError("load_state_dict", name, f"is in {where} only", fix)
    for name, value in local.items():
        expected = list(value.shape)
        if name in stacks:
            expected[0] *= mesh.ep
        if list(given[name].shape) != expected:
            why = f"has shape {list(given[name].shape)}, and the model has {expected}"
            raise ConfigError("load_state_dict", name, why, fix)
    for name, value in local.items():
        copy_full_into_shard(value, _own_part(given[name], value, name in stacks, mesh))


def full_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, mesh: ParallelMesh
) -> dict[str, Any]:
    """Return an optimizer's state by the names of parameters, on the CPU of each rank. Collective.

    Tensors of a parameter's shape have all E experts.
    """
    names, experts = _names_and_stacks(model)
    full: dict[str, Any] = {}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        name = names[id(parameter)]
        full[name] = {
            key: gather_full({name: value}, experts, mesh)[name].cpu().clone()
            if isinstance(value, Tensor) and value.shape == parameter.shape
            else value
            for key, value in optimizer.state[parameter].items()
        }
    groups = [
        {**group, "params": [names[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    return {"state": full, "param_groups": groups}


def local_optimizer_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    mesh: ParallelMesh,
    state: Mapping[str, Any],
) -> dict[str, Any]:
    """Return this rank's part of `full_optimizer_state`, for `optimizer.load_state_dict`."""
    names, experts = _names_and_stacks(model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    local: dict[int, dict[str, Any]] = {}
    for index, parameter in enumerate(parameters):
        name = names[id(parameter)]
        shape = list(parameter.shape)
        if name in experts:
            shape[0] *= mesh.ep
        for key, value in state["state"].get(name, {}).items():
            if isinstance(value, Tensor) and shape and list(value.shape) == shape:
                own = torch.zeros_like(parameter)
                copy_full_into_shard(own, _own_part(value, own, name in experts, mesh))
                value = own.detach()
            local.setdefault(index, {})[key] = value
    numbers, groups = iter(range(len(parameters))), []
    for group, given in zip(optimizer.param_groups, state["param_groups"], strict=True):
        groups.append({**given, "params": [next(numbers) for _ in group["params"]]})
    return {"state": local, "param_groups": groups}


def _names_and_stacks(model: nn.Module) -> tuple[dict[int, str], set[str]]:
    """Return the names of parameters by id, and those of expert stacks. Raises ConfigError."""
    if expert_locations(model):
        why = "the optimizer's state of experts of different shapes is not collected"
        raise ConfigError("experts.shapes", "set", why, "leave it out, or train with dmoe.train")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return names, set(expert_parameters(model))


def _own_part(full: Tensor, like: Tensor, is_stack: bool, mesh: ParallelMesh) -> Tensor:
    """Return this rank's experts of a stack [E, ...], or another tensor as it is."""
    full = full.to(like.device)
    if is_stack:
        full = full[mesh.ep_rank * len(like) : (mesh.ep_rank + 1) * len(like)]
    return full


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def full_norm(value: Tensor) -> float:
    """Compute the 2-norm of the full tensor, on every rank; a collective if it is sharded."""
    return float(_unsharded(value.detach().norm()))


def on_device_of(parameter: Tensor, value: Tensor) -> Tensor:
    """Return `value`, sharded as it is, on the device of its parameter, for a collective.

    A moment may be in the memory of the host (`optim.offload`).
    """
    local = local_tensor(value).to(local_tensor(parameter).device)
    if not isinstance(value, DTensor):
        return local
    return DTensor(local, value._spec, requires_grad=False)


def full_tensor(value: Tensor) -> Tensor:
    """Copy the full tensor of `state_dict.model_state`, on every rank; collective if sharded."""
    return value.full_tensor().detach() if isinstance(value, DTensor) else value.detach().clone()


def copy_full_into_shard(value: Tensor, full: Tensor) -> None:
    """Fill this rank's part of `value` from the full tensor of every rank. No collective."""
    if isinstance(value, DTensor):
        full = local_tensor(
            distribute_tensor(full, value.device_mesh, value.placements, src_data_rank=None)
        )
    with torch.no_grad():
        local_tensor(value).copy_(full)


def _unsharded(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
