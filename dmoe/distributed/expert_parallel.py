"""Expert parallelism: shard the experts of a model and list what differs by EP rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from dmoe.config.errors import ConfigError
from dmoe.config.schema import ExchangeConfig
from dmoe.distributed.all_to_all import ExpertGroup, PackedAllToAll
from dmoe.distributed.collective_check import CollectiveChecker
from dmoe.distributed.exchange.chunks import ChunkedPacked, ChunkedPadded, check_chunks
from dmoe.distributed.exchange.deep_ep import DeepEP, LibraryBuffer, check_library
from dmoe.distributed.exchange.once_per_rank import OncePerRank, check_once_per_rank
from dmoe.distributed.exchange.overlap import OverlappedPacked, OverlappedPadded, check_overlap
from dmoe.distributed.exchange.two_level import TwoLevelGroup, check_levels
from dmoe.distributed.mesh import ParallelMesh, ProcessGroupComm
from dmoe.distributed.padded_all_to_all import PaddedAllToAll, PooledAllToAll
from dmoe.distributed.placement.copies import CopyingAllToAll, check_copies
from dmoe.moe.base_layer import MoELayer
from dmoe.moe.copy_planner import CopyRule
from dmoe.moe.experts import HeterogeneousExperts
from dmoe.moe.interfaces import ExpertLayer
from dmoe.moe.layer import MoE


def shard_experts(
    model: nn.Module,
    mesh: ParallelMesh,
    checker: CollectiveChecker | None = None,
    *,
    average: bool = False,
    copies: CopyRule | None = None,
    exchange: ExchangeConfig | None = None,
) -> None:
    """Keep this rank's experts in every MoE layer and dispatch tokens to the others by all-to-all.

    Call it before the weights are materialised (on the meta device, so that a rank never holds
    more than its own experts) and before an optimizer sees the parameters. With EP = 1 nothing is
    sharded. `checker` compares every all-to-all over the ranks (`debug.collectives`). With
    `average`, auxiliary losses are such that their mean over the ranks is the loss, not their sum.
    With `copies`, MoE layers copy hot experts for the step (`placement/copies.py`). `exchange`:
    options of the exchange. No collective.
    """
    exchange, library = exchange or ExchangeConfig(), None
    if exchange.library == "deep_ep" and mesh.ep_group is not None:
        library = LibraryBuffer(mesh.ep_group)
    for layer in moe_layers(model):
        if mesh.world_size > 1:
            layer.comm = ProcessGroupComm(mesh, average)
        if mesh.ep_group is not None:
            layer.shard(mesh.ep, mesh.ep_rank)
            wire = None
            if exchange.wire == "bf16":
                check_wire(layer)
                wire = torch.bfloat16
            expert_group = ExpertGroup(mesh.ep_group, layer.layer, checker, wire=wire)
            if exchange.levels == 2:
                check_levels(mesh, copies is not None and isinstance(layer, MoELayer))
                expert_group = TwoLevelGroup(
                    mesh.ep_group,
                    layer.layer,
                    checker,
                    wire=wire,
                    inside=mesh.node_group,
                    across=mesh.cross_group,
                )
            layer.packed = PackedAllToAll(expert_group)
            if copies is not None and isinstance(layer, MoELayer):
                check_copies(layer, copies)
                layer.packed = CopyingAllToAll(expert_group, copies)
            if layer.padded is not None:
                pooled = isinstance(layer, MoELayer) and layer.capacity.pool > 1
                layer.padded = (PooledAllToAll if pooled else PaddedAllToAll)(expert_group)
            if exchange.overlap:
                check_overlap(layer)
            if exchange.chunks > 1:
                check_chunks(layer, exchange.chunks, mesh.ep)
                options = (expert_group, exchange.chunks, exchange.overlap)
                layer.packed = ChunkedPacked(*options)
                layer.padded = layer.padded and ChunkedPadded(*options)
            elif exchange.overlap:
                layer.packed = OverlappedPacked(expert_group)
                layer.padded = layer.padded and OverlappedPadded(expert_group)
            if exchange.once_per_rank:
                check_once_per_rank(layer)
                layer.packed = OncePerRank(expert_group)
            if library is not None:
                check_library(layer, checker is not None)
                layer.packed = DeepEP(expert_group, library)
            check_row_kernels(layer)


def check_row_kernels(layer: ExpertLayer) -> None:
    """Refuse Triton's kernels where the dispatcher moves its rows by others. Raises ConfigError."""
    others = (CopyingAllToAll, OncePerRank, DeepEP)
    if isinstance(layer, MoELayer) and layer.kernels != "torch" and type(layer.packed) in others:
        allowed = "does not know the rows of exchange.once_per_rank, exchange.library and copies"
        raise ConfigError("moe.kernels", layer.kernels, allowed, "use torch")


def check_wire(layer: ExpertLayer) -> None:
    """Refuse a bf16 wire where it does not work or saves nothing. Raises ConfigError."""
    why = None
    if layer.padded is not None and isinstance(layer, MoELayer) and layer.capacity.pool > 1:
        why = "does not work with pooled slots, whose counts are in the rows"
    elif any(weight.element_size() == 2 for weight in layer.experts.parameters()):
        why = "saves nothing where rows are bfloat16 already"
    if why is not None:
        raise ConfigError("parallel.exchange.wire", "bf16", why, "use full")


def expert_group_of(layer: ExpertLayer) -> dist.ProcessGroup | None:
    """Return the ranks that share a layer's experts; None if this one has them all."""
    dispatcher = layer.packed
    return dispatcher.expert_group.group if isinstance(dispatcher, PackedAllToAll) else None


def stacks_over_ranks(stacks: Iterable[nn.Module], group: dist.ProcessGroup) -> DeviceMesh:
    """Replace the parameters of stacked experts by DTensors over the ranks of `group`.

    For a model on the meta device whose weights a reader of DTensors fills. No collective.

    Args:
        stacks: modules whose own parameters are [E, ...].
        group: the ranks that share the experts.

    Returns:
        Their device mesh.
    """
    device_mesh: Any = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("ep",))
    for module in stacks:
        for name, parameter in list(module.named_parameters(recurse=False)):
            part = distribute_tensor(parameter, device_mesh, [Shard(0)], src_data_rank=None)
            setattr(module, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
    return cast(DeviceMesh, device_mesh)


def moe_layers(model: nn.Module) -> list[ExpertLayer]:
    """List every layer with experts: MoE layers, and modules added to a frozen base model."""
    # the protocol alone takes 0.2 ms per module before Python 3.12
    return [
        module
        for module in model.modules()
        if hasattr(module, "experts") and isinstance(module, ExpertLayer)
    ]


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Collect the parameters that differ by EP rank, by name: those of all experts."""
    expert_ids = {
        id(parameter) for layer in moe_layers(model) for parameter in layer.experts.parameters()
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in expert_ids
    }


def expert_buffers(model: nn.Module) -> set[str]:
    """Collect the names of the buffers that differ by EP rank, such as sparse modules' indices."""
    expert_ids = {id(buffer) for layer in moe_layers(model) for buffer in layer.experts.buffers()}
    return {name for name, buffer in model.named_buffers() if id(buffer) in expert_ids}


@dataclass(frozen=True)
class ExpertLocation:
    """EP rank, shape, dtype and device of one heterogeneous expert's matrix."""

    ep_rank: int
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    """The own device of each rank."""


def expert_locations(model: nn.Module) -> dict[str, ExpertLocation]:
    """Locate the matrices of all heterogeneous experts, by name; the same on every rank.

    Uniform experts are not included: they are stacks [e, ...] with one name, of which every EP rank
    has an equal part.
    """
    locations = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, MoE) or not isinstance(layer.experts, HeterogeneousExperts):
            continue
        local = next(layer.experts.parameters())
        for expert, shapes in enumerate(layer.experts.matrices):
            for n, shape in enumerate(shapes):
                name = f"{path}.experts.{expert}.w{n}".removeprefix(".")
                locations[name] = ExpertLocation(
                    layer.placement.rank_of[expert], shape, local.dtype, local.device
                )
    return locations
