"""From a model that holds every expert to one rank's part of it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn

from dmoe.distributed.all_to_all import PackedAllToAll, PaddedAllToAll, Route
from dmoe.distributed.peers import GroupPeers
from dmoe.distributed.topology import Topology
from dmoe.distributed.watch import Watch
from dmoe.moe.layer import MoE

__all__ = ["Replication", "expert_parameters", "moe_layers", "shard_experts"]


class Replication(Protocol):
    """How ranks share a parameter that is the same on all of them, and sum its gradient: `ddp.Replicated` or `fsdp.Sharded`.

    Made from the model of `shard_experts`, with its weights drawn, and before the optimizer: its parameters may become others.
    Collective.
    """

    wrapped: nn.Module
    """What is called: the model, under autocast."""

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around one forward and backward of an optimizer step. Gradients are summed over the ranks in the `last` of them."""
        ...

    def finish(self) -> None:
        """Wait for the sums: afterwards every `grad` is the gradient of the global batch's loss."""
        ...


def shard_experts(model: nn.Module, topology: Topology, watch: Watch | None = None) -> None:
    """Keep this rank's experts in every MoE layer, and send tokens to the others by all-to-all.

    Call it before the weights are materialised (on the meta device, a rank never holds more than its own experts) and before an
    optimizer sees the parameters. With EP = 1 nothing is sharded and nothing is sent. `watch` compares every exchange over the
    ranks (`debug.collectives`). No collective.
    """
    for layer in moe_layers(model):
        if topology.world > 1:
            layer.peers = GroupPeers(topology)
        if topology.exchange is not None:
            owned = topology.owned(layer.experts.num_experts)
            layer.experts.shard(owned.start, len(owned))
            route = Route(topology.exchange, layer.layer, watch)
            layer.packed = PackedAllToAll(route)
            layer.padded = None if layer.padded is None else PaddedAllToAll(route)


def moe_layers(model: nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that differ by EP rank, by name: those of every MoE layer's experts."""
    owned = {id(parameter) for layer in moe_layers(model) for parameter in layer.experts.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in owned}
