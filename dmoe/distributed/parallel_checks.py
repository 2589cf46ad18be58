"""Refuse uses of a `ParallelModel` that would give wrong numbers in silence.

Wrappers: DDP and FSDP around sharded experts.

DDP would broadcast rank 0's experts over the others and average different experts; FSDP would
gather a whole of parts that are not of one tensor. Three places see them: `parallelize` looks at
the model it is given, `ParallelModel` at DDP that wraps it, and every MoE layer at its forward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TypeVar

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from dmoe.config.errors import ConfigError
from dmoe.distributed.expert_parallel import expert_parameters, moe_layers
from dmoe.distributed.mesh import ParallelMesh
from dmoe.moe.base_layer import MoELayer
from dmoe.moe.dispatch import PackedLocal
from dmoe.moe.interfaces import NoComm

WRAPPERS = (DistributedDataParallel, FullyShardedDataParallel, FSDPModule, nn.DataParallel)
NAMED_WRAPPERS = ("_FabricModule", "DeepSpeedEngine")
"""Classes of packages that dmoe does not import: Lightning Fabric's and DeepSpeed's."""
MODES = ("ddp", "fsdp", None)


def wrapper_error(wrapper: str) -> ConfigError:
    """Return the error for a model with sharded experts in `wrapper`, with the right call."""
    return ConfigError(
        "model",
        f"in {wrapper}",
        "dmoe.parallelize already replicates or shards it, and no other wrapper knows that experts"
        " differ between ranks",
        "call the ParallelModel itself; give accelerate (prepare) or Fabric (setup_optimizers,"
        " setup_dataloaders) only the optimizer and the data",
    )


def check_model(
    model: nn.Module, ep: int, mode: str | None, mesh: ParallelMesh | None, copies: int | str
) -> None:
    """Refuse arguments of `parallelize` that cannot work. Raises ConfigError."""
    if not isinstance(model, nn.Module):
        allowed = "must be a torch.nn.Module"
        raise ConfigError("model", type(model).__name__, allowed, "give the model itself")
    if mode not in MODES:
        raise ConfigError("mode", mode, "must be ddp, fsdp or None", "use ddp")
    if copies != "auto" and (type(copies) is not int or copies < 0):
        allowed = "must be auto or a number of slots per rank, from 0 up"
        raise ConfigError("copies", copies, allowed, "use auto")
    if mesh is not None and not isinstance(mesh, ParallelMesh):
        raise ConfigError(
            "mesh", type(mesh).__name__, "must be that of a ParallelModel", "leave it out"
        )
    world = dist.get_world_size() if dist.is_initialized() else 1
    if type(ep) is not int or ep < 1 or world % ep:
        sizes = [size for size in range(1, world + 1) if world % size == 0]
        fix = f"use one of {sizes}, or start more ranks (torchrun) and init_process_group first"
        raise ConfigError("ep", ep, f"must divide the number of ranks, {world}", fix)
    if mesh is not None and mesh.ep != ep:
        raise ConfigError("ep", ep, f"must be that of mesh, {mesh.ep}", f"use ep={mesh.ep}")
    for module in model.modules():
        name = type(module).__name__
        if isinstance(module, WRAPPERS) or name in NAMED_WRAPPERS:
            raise wrapper_error(next((w.__name__ for w in WRAPPERS if isinstance(module, w)), name))
    layers = moe_layers(model)
    if not layers and ep > 1:
        raise ConfigError("model", type(model).__name__, "has no dmoe.MoE layer", "use ep=1")
    if not any(True for _ in model.parameters()):
        raise ConfigError("model", type(model).__name__, "has no parameters", "give another")
    once = any(type(module).__name__ == "ParallelModel" for module in model.modules())
    for layer in layers:
        if once or not isinstance(layer.comm, NoComm):
            raise ConfigError(
                "model", type(model).__name__, "is parallel already", "call parallelize once"
            )
        count = layer.num_experts - layer.num_zero_cost if isinstance(layer, MoELayer) else ep
        if count % ep:
            raise ConfigError(
                "ep", ep, f"must divide the {count} experts of layer {layer.layer}", "use 1"
            )
    meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if meta is not None:
        raise ConfigError("model", meta, "has no weights yet (meta)", "initialise the model first")


def check_parallel(layer: MoELayer) -> None:
    """Refuse a training forward on several ranks of a layer that knows only one.

    DDP or a trainer of others would average the gradients of this rank's experts with those of
    other ones, or train with losses and biases that differ between the ranks.

    Raises:
        ConfigError: there are several ranks, and nothing has parallelized the layer.
    """
    if isinstance(layer.comm, NoComm) and dist.is_initialized() and dist.get_world_size() > 1:
        raise ConfigError(
            "model",
            f"MoE layer {layer.layer}",
            f"trains on {dist.get_world_size()} ranks, and dmoe has not been told of them: plain"
            " DDP gives wrong gradients of experts, norms and checkpoints in silence",
            "use model = dmoe.parallelize(model, ep=...) in a loop of your own, or dmoe train",
        )


def watch_layers(model: nn.Module, ddp: DistributedDataParallel | None) -> None:
    """Make each MoE layer check at its forward that nothing has wrapped it. `ddp`: the own one."""
    for layer in moe_layers(model):
        assert isinstance(layer, nn.Module)
        sharded = isinstance(layer.experts, FSDPModule)
        kept = None if sharded else list(layer.experts.parameters())
        layer.register_forward_pre_hook(partial(_check_layer, ddp, kept))
        if sharded or not isinstance(layer.packed, PackedLocal):
            layer.register_state_dict_pre_hook(_refuse_part)


def _refuse_part(layer: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Refuse `state_dict()` of the model inside, which has this rank's experts only."""
    if not keep_vars:  # with it, the caller works on the parameters themselves
        raise ConfigError(
            "state_dict",
            "of this rank",
            f"has only this rank's part of {prefix}experts",
            "call the ParallelModel's state_dict on every rank",
        )


def _check_layer(
    ddp: DistributedDataParallel | None,
    kept: list[nn.Parameter] | None,
    layer: nn.Module,
    args: object,
) -> None:
    active = DistributedDataParallel._get_active_ddp_module()
    if active is not None and active is not ddp:
        raise wrapper_error("DistributedDataParallel")
    if kept is None:
        return
    now = list(layer.experts.parameters())  # type: ignore[union-attr]
    if {id(p) for p in now} != {id(p) for p in kept}:
        raise ConfigError(
            "model",
            "its experts' parameters",
            "are not those that dmoe.parallelize made: FSDP or load_state_dict(assign=True) has"
            " replaced them",
            "call the ParallelModel itself, and its load_state_dict",
        )


Owner = TypeVar("Owner", bound=nn.Module)


def before_every_step(owner: Owner, call: Callable[[Owner, Optimizer], None]) -> None:
    """Call `call(owner, optimizer)` before each step of torch's optimizers, while `owner` lives."""
    alive = weakref.ref(owner)

    def before_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
        if (own := alive()) is not None:
            call(own, optimizer)

    handle = register_optimizer_step_pre_hook(before_step)
    weakref.finalize(owner, handle.remove)


def check_optimizer(
    optimizer: Optimizer, replaced: Mapping[int, weakref.ref[nn.Parameter]]
) -> set[int]:
    """Return the ids of an optimizer's parameters. Raises ConfigError if it has `replaced` ones."""
    updated = [p for group in optimizer.param_groups for p in group["params"]]
    if any((old := replaced.get(id(p))) is not None and old() is p for p in updated):
        raise ConfigError(
            "optimizer",
            type(optimizer).__name__,
            "has parameters that parallelize has replaced by this rank's part of them",
            "make the optimizer after dmoe.parallelize, of model.parameters()",
        )
    return {id(p) for p in updated}


def check_reduced(model: nn.Module) -> None:
    """Raise ConfigError if a parameter in DDP has no gradient: then its bucket is not reduced."""
    experts = expert_parameters(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None and name not in experts:
            why = "has no gradient, so DDP has not reduced those of its bucket"
            raise ConfigError("parameter", name, why, "use parallelize(mode=None), or freeze it")


def check_unchanged(unchanged: Iterable[bool]) -> None:
    """Raise ConfigError if a gradient was changed between the backward and the step."""
    if not all(unchanged):
        raise ConfigError(
            "gradients",
            "changed after backward",
            "torch.nn.utils.clip_grad_norm_ sees only the experts of this rank",
            "call model.clip_grad_norm_(max_norm); after changes of your own, with math.inf",
        )


def refuse_partial_state(optimizer: Optimizer) -> None:
    """Make `optimizer.state_dict()` an error: one rank's would be loaded into all experts."""
    if optimizer._optimizer_state_dict_pre_hooks:
        return

    def refuse(optimizer: Optimizer) -> None:
        raise ConfigError(
            "state_dict",
            "of this rank's optimizer",
            "has only this rank's part of the experts",
            "call model.optimizer_state_dict(optimizer) on every rank, and save it on one",
        )

    optimizer.register_state_dict_pre_hook(refuse)
