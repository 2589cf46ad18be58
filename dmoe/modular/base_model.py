"""The base model: everything of a network that is not an adapter layer.

Freezing it and proving by hash that it did not change; selecting what is trained; adding modules to
a bank, and training one module while the others keep their bits: continual learning by addition
(Rusu et al. 2016; MAD-X, Pfeiffer et al. 2020).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.modular.attach import CHILD, adapter_layers
from dmoe.modular.routing.learned import PerSequence, PerTask
from dmoe.modular.routing.tables import ConstantRouter, TableRouter
from dmoe.moe.base_layer import MoELayer
from dmoe.moe.dispatch import PackedLocal
from dmoe.moe.rng import normal_
from dmoe.moe.routers.adaptive import AdaptiveRouter
from dmoe.moe.routers.base import RouterModule
from dmoe.moe.routers.static import FixedRouter
from dmoe.moe.routers.topk import DenseRouter, TopKRouter

TRAIN_MODES = ("joint", "modules", "one_module", "router")
"""Training modes (Pfeiffer et al. 2023, section 6): everything; modules, routers and aggregations
on a frozen base model; modules only, one at a time (`freeze_all_but`); routers and aggregations
over frozen modules."""
GROWABLE = TopKRouter | AdaptiveRouter | DenseRouter
"""Learned routers that keep their decisions among the old modules when modules are added."""


def base_model_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the base model's parameters and persistent buffers by name, sorted; detached views."""
    state = model.state_dict()
    return {name: state[name].detach() for name in sorted(state) if CHILD not in name.split(".")}


def base_model_hash(model: nn.Module) -> str:
    """Return the SHA-256 over name, dtype, shape and bytes of every tensor of the base model.

    It is equal before `attach`, with adapter layers and after `detach`. It reads every byte: about
    a second per GB.

    Raises: ConfigError for sharded experts: a rank's shard has a hash of its own.
    """
    for name, module in model.named_modules():
        if isinstance(module, MoELayer) and not isinstance(module.packed, PackedLocal):
            allowed = "holds only a shard of its experts"
            raise ConfigError("base_model_hash", name, allowed, "take the hash before sharding")
    return hash_tensors(base_model_state(model).items()).hex()


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> bytes:
    """Return the SHA-256 over name, dtype, shape and bytes of the tensors, in their order."""
    digest = hashlib.sha256()
    for name, value in tensors:
        assert not value.is_meta, f"{name} has no bytes: it is on the meta device"
        dtype = str(value.dtype).removeprefix("torch.")
        digest.update(f"{name}\0{dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def freeze(model: nn.Module) -> str:
    """Freeze the base model and return its hash, to be compared after training."""
    select_trainable(model, "modules")
    return base_model_hash(model)


def select_trainable(model: nn.Module, what: str) -> list[nn.Parameter]:
    """Set `requires_grad` of every parameter and return the trainable ones.

    `what` is one of `TRAIN_MODES`. Raises: ConfigError for any other value.
    """
    if what not in TRAIN_MODES:
        allowed = f"must be one of {', '.join(TRAIN_MODES)}"
        raise ConfigError("modular.train", what, allowed, "use modules")
    for parameter in model.parameters():
        parameter.requires_grad_(what == "joint")
    trainable = list(model.parameters() if what == "joint" else _module_parameters(model, what))
    for parameter in trainable:
        parameter.requires_grad_(True)
    return trainable


def _module_parameters(model: nn.Module, what: str) -> Iterator[nn.Parameter]:
    for layer in adapter_layers(model).values():
        if what != "router":
            yield from layer.experts.parameters()
        if what != "one_module":
            yield from layer.router.parameters()
            yield from layer.aggregation.parameters()


def add_modules(model: nn.Module, count: int = 1, *, seed: int = 0) -> range:
    """Append `count` new modules to every bank, extend the routers, and return the new ids.

    Module m gets the weights it would have in a bank that was created with it. Before sharding and
    before the optimizer is created.

    Raises: ConfigError if a bank is sharded, banks differ in size, or a router or an aggregation
    cannot be extended. Then nothing is changed.
    """
    layers = adapter_layers(model)
    sizes = {layer.experts.num_modules for layer in layers.values()}
    if len(sizes) != 1:
        allowed = "must be one number for all banks, and there must be a bank"
        raise ConfigError("modules", sorted(sizes), allowed, "attach banks of one size")
    for name, layer in layers.items():
        if not layer.experts.holds_all_modules:
            allowed = "holds only a shard of its modules"
            raise ConfigError("modules", name, allowed, "add modules before sharding")
        if layer.aggregation.per_choice and layer.router.top_k == layer.experts.num_modules:
            kind = type(layer.aggregation).__name__
            allowed = "has parameters for each of the present modules"
            raise ConfigError("aggregation", kind, allowed, "use weighted_sum or attention")
        check_can_grow(layer.router)
    for layer in layers.values():
        grow_router(layer.router, count, seed)
    before = sizes.pop()
    for layer in layers.values():
        layer.experts.add_modules(count)
    return range(before, before + count)


def check_can_grow(router: RouterModule) -> None:
    """Raise ConfigError for a router that would change old decisions if modules were added.

    Such are hash, group_limited, expert_choice and noisy routing.
    """
    if isinstance(router, PerSequence | PerTask):
        check_can_grow(router.router)
    elif not isinstance(router, GROWABLE | ConstantRouter | TableRouter | FixedRouter):
        raise ConfigError(
            "router",
            type(router).__name__,
            "would route old tokens to other modules if modules were added",
            "use top_k, soft, adaptive, fixed, a table or constant weights",
        )


def grow_router(router: RouterModule, count: int, seed: int, *, std: float = 0.02) -> None:
    """Extend a router by `count` modules.

    A learned matrix gets `count` rows, keyed by (seed, layer, id). The logits of the old modules
    do not change, but a softmax over more logits gives each a smaller share. Constant weights are
    extended by zeros. A table keeps its rows; `add_row` gives a label the new module.

    Args:
        router: router of an adapter layer; changed in place.
        count: number of new modules.
        seed: seed of the new rows.
        std: standard deviation of the new rows.

    Raises:
        ConfigError: for a router that cannot be extended (`check_can_grow`); it is not changed.
    """
    check_can_grow(router)
    if isinstance(router, PerSequence | PerTask):
        grow_router(router.router, count, seed, std=std)
        router.num_experts, router.top_k = router.router.num_experts, router.router.top_k
        return
    first = router.num_experts
    if isinstance(router, GROWABLE):
        new_ED = router.weight.new_empty(count, router.weight.shape[1])
        for row, new_D in enumerate(new_ED):
            normal_(new_D, std, seed, "router", router.layer, "grown", first + row)
        router.weight = nn.Parameter(
            torch.cat([router.weight.detach(), new_ED]), requires_grad=router.weight.requires_grad
        )
        router.bias_E = _append_zeros(router.bias_E, count)
    elif isinstance(router, ConstantRouter):
        router.weights += (0.0,) * count
        router.weight_M = _append_zeros(router.weight_M, count)
    router.num_experts = first + count
    if isinstance(router, DenseRouter | ConstantRouter):
        router.top_k = router.num_experts


def _append_zeros(value_E: Tensor, count: int) -> Tensor:
    return torch.cat([value_E, value_E.new_zeros(count)])


def freeze_all_but(
    model: nn.Module, module: int, optimizer: torch.optim.Optimizer
) -> Callable[[], None]:
    """Let steps of `optimizer` change one module of every bank, and nothing else.

    Modules are slices of one stacked parameter, and a zero gradient does not freeze a slice: weight
    decay shrinks it, and moments of earlier steps move it. So the gradient of the other modules is
    zeroed before it is accumulated (gradient norm and clipping see one module only), and their bits
    are restored after each optimizer step. Cost: a copy of the bank, and one more copy per step.

    Args:
        model: the network, after sharding; called on every rank.
        module: global id of the module that is trained.
        optimizer: holds the banks' parameters.

    Returns:
        A function that ends it.

    Raises:
        ConfigError: for an unknown module, or modules split by FSDP2.
    """
    for name, layer in adapter_layers(model).items():
        if not 0 <= module < layer.experts.num_modules:
            allowed = f"{name} has the modules 0 to {layer.experts.num_modules - 1}"
            raise ConfigError("module", module, allowed, "name one of them, or add modules")
        if any(type(parameter.data) is not Tensor for parameter in layer.experts.parameters()):
            allowed = (
                f"splits the modules at {name} among the ranks, but restoring needs whole ones"
            )
            raise ConfigError("parallel.mode", "fsdp", allowed, "use ddp")
    select_trainable(model, "one_module")
    handles: list[Any] = []
    saved: list[tuple[nn.Parameter, Tensor, Tensor]] = []
    for layer in adapter_layers(model).values():
        bank = layer.experts
        for parameter in bank.parameters():
            others_e = torch.arange(len(parameter), device=parameter.device) + bank.first != module
            saved.append((parameter, others_e, parameter.detach()[others_e].clone()))
            hook = _zero_gradient_of(others_e)
            handles.append(parameter.register_hook(hook))  # type: ignore[no-untyped-call]

    def restore(*_: object) -> None:
        with torch.no_grad():
            for parameter, others_e, value in saved:
                parameter[others_e] = value

    handles.append(optimizer.register_step_post_hook(restore))

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end


def _zero_gradient_of(others_e: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.masked_fill(
        others_e.view(-1, *[1] * (gradient.dim() - 1)), 0.0
    )
