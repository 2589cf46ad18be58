"""From a model that holds every expert to one rank's part of it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from dmoe.distributed.all_to_all import ExpertGroup, PackedAllToAll, PaddedAllToAll
from dmoe.distributed.collective_check import CollectiveChecker
from dmoe.distributed.mesh import ParallelMesh, ProcessGroupComm
from dmoe.moe.experts import HeterogeneousExperts
from dmoe.moe.interfaces import ExpertLayer
from dmoe.moe.layer import MoE


class DataParallel(Protocol):
    """How ranks share a parameter that is the same on all of them, and sum its gradient: `ddp.Replicated` or `fsdp.Sharded`.

    Made from the model of `shard_experts`, with its weights drawn, and before the optimizer: its parameters may become others.
    Collective.
    """

    wrapped: nn.Module
    """What is called: the model, under autocast."""

    def grad_sync(self, last: bool) -> AbstractContextManager[None]:
        """Around one forward and backward of an optimizer step. Gradients are summed over the ranks in the `last` of them."""
        ...

    def wait_for_grads(self) -> None:
        """Wait for the sums: afterwards every `grad` is the gradient of the global batch's loss."""
        ...


def shard_experts(
    model: nn.Module, mesh: ParallelMesh, checker: CollectiveChecker | None = None
) -> None:
    """Keep this rank's experts in every MoE layer, and send tokens to the others by all-to-all.

    Call it before the weights are materialised (on the meta device, a rank never holds more than its own experts) and before an
    optimizer sees the parameters. With EP = 1 nothing is sharded and nothing is sent. `watch` compares every exchange over the
    ranks (`debug.collectives`). No collective.
    """
    for layer in moe_layers(model):
        if mesh.world_size > 1:
            layer.comm = ProcessGroupComm(mesh)
        if mesh.ep_group is not None:
            layer.shard(mesh.ep, mesh.ep_rank)
            route = ExpertGroup(mesh.ep_group, layer.layer, checker)
            layer.packed = PackedAllToAll(route)
            layer.padded = None if layer.padded is None else PaddedAllToAll(route)


def moe_layers(model: nn.Module) -> list[ExpertLayer]:
    """Every layer with experts: mixtures of them, and modules beside a frozen network."""
    return [module for module in model.modules() if isinstance(module, ExpertLayer)]


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that differ by EP rank, by name: those of every MoE layer's experts."""
    owned = {
        id(parameter) for layer in moe_layers(model) for parameter in layer.experts.parameters()
    }
    return {
        name: parameter for name, parameter in model.named_parameters() if id(parameter) in owned
    }


def expert_buffers(model: nn.Module) -> set[str]:
    """The names of the buffers that differ by EP rank: the places of sparse modules, for one."""
    owned = {id(buffer) for layer in moe_layers(model) for buffer in layer.experts.buffers()}
    return {name for name, buffer in model.named_buffers() if id(buffer) in owned}


@dataclass(frozen=True)
class ExpertLocation:
    """Where a matrix lives that belongs to one expert alone."""

    ep_rank: int
    shape: tuple[int, int]
    dtype: torch.dtype


def expert_locations(model: nn.Module) -> dict[str, ExpertLocation]:
    """The matrices of all experts of different shape, by name, those of other ranks included; the same on every rank.

    Uniform experts are not among them: they are stacks [e, ...], of which every EP rank has an equal part under one name.
    """
    found = {}
    for path, module in model.named_modules():
        layer = module if isinstance(module, MoE) else None
        if layer is None or not isinstance(layer.experts, HeterogeneousExperts):
            continue
        dtype = next(layer.experts.parameters()).dtype
        for expert, sizes in enumerate(layer.experts.matrices):
            for n, size in enumerate(sizes):
                name = f"{path}.experts.{expert}.w{n}".removeprefix(".")
                found[name] = ExpertLocation(layer.placement.rank_of[expert], size, dtype)
    return found
