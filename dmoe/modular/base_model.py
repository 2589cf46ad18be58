"""The core: everything of a model that is no module. Frozen, and proven to be.

One more module in every bank. The others, and the core, keep their bits.

One module of a bank is trained and the others keep their bits: continual learning by addition (Rusu et al. 2016; MAD-X).

Modules are slices of one stacked parameter, and a zero gradient is not enough: weight decay shrinks every slice, and moments of earlier
steps go on moving it. So the gradient of the others is zeroed before it is summed (the norm and the clip see the one module alone), and
after each step of the optimizer their bits are put back. Cost: a copy of the bank, and a copy of it a step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.modular.attach import CHILD, adapter_layers
from dmoe.modular.routing.learned import PerSequence, PerTask
from dmoe.modular.routing.tables import ConstantRouter, TableRouter
from dmoe.moe.dispatch import PackedLocal
from dmoe.moe.layer import MoE
from dmoe.moe.rng import normal_
from dmoe.moe.routers.adaptive import AdaptiveRouter
from dmoe.moe.routers.base import RouterModule
from dmoe.moe.routers.dense import DenseRouter
from dmoe.moe.routers.static import FixedRouter
from dmoe.moe.routers.topk import TopKRouter

TRAIN_MODES = ("joint", "modules", "one_module", "router")
"""What is trained (Pfeiffer et al. 2023, section 6): all; modules with routers and aggregations on a frozen core; modules alone, for
one of them at a time (`one_module.train_one`); routers and aggregations over modules that are done."""


def base_model_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer of the core, by the name it has without modules, sorted; detached, not copied."""
    state = model.state_dict()
    return {name: state[name].detach() for name in sorted(state) if CHILD not in name.split(".")}


def base_model_hash(model: nn.Module) -> str:
    """SHA-256 over name, dtype, shape and bytes of everything in the core. Equal before `attach`, with modules, and after `detach`.

    Before sharding: a rank's part of a core has another hash. Reads every byte: about a second for each GB.
    Raises: ConfigError for a core whose experts are sharded already.
    """
    for name, module in model.named_modules():
        if isinstance(module, MoE) and not isinstance(module.packed, PackedLocal):
            raise ConfigError(
                "core_hash",
                name,
                "holds a part of its experts only",
                "take the hash before sharding",
            )
    digest = hashlib.sha256()
    for name, value in base_model_state(model).items():
        assert not value.is_meta, f"{name} has no bytes: it is on the meta device"
        digest.update(
            f"{name}\0{str(value.dtype).removeprefix('torch.')}\0{tuple(value.shape)}\0".encode()
        )
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def freeze(model: nn.Module) -> str:
    """Train no part of the core; returns its hash, to be compared when training is over. `select(model, "modules")` with a proof."""
    select_trainable(model, "modules")
    return base_model_hash(model)


def select_trainable(model: nn.Module, what: str) -> list[nn.Parameter]:
    """Say what is trained by `requires_grad`, and return it: one of `TRAIN`. Raises ConfigError for anything else."""
    if what not in TRAIN_MODES:
        raise ConfigError(
            "modular.train", what, f"must be one of {', '.join(TRAIN_MODES)}", "use modules"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(what == "joint")
    chosen = list(model.parameters()) if what == "joint" else list(_module_parameters(model, what))
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def _module_parameters(model: nn.Module, what: str) -> Iterator[nn.Parameter]:
    for layer in adapter_layers(model).values():
        if what != "router":
            yield from layer.experts.parameters()
        if what != "one_module":
            yield from layer.router.parameters()
            yield from layer.aggregation.parameters()


def add_modules(model: nn.Module, count: int = 1, *, seed: int = 0) -> range:
    """Add `count` fresh modules to every bank and tell the routers; returns their ids.

    Module m has the weights it would have had in a bank that was made with it. Before sharding, before the optimizer.
    Raises: ConfigError where a bank is sharded, banks differ in size, or a router or an aggregation cannot grow; then nothing is
    changed.
    """
    found = adapter_layers(model)
    sizes = {layer.experts.num_modules for layer in found.values()}
    if len(sizes) != 1:
        raise ConfigError(
            "modules",
            sorted(sizes),
            "must be one number for all banks, and there must be a bank",
            "attach banks of one size",
        )
    for name, layer in found.items():
        if not layer.experts.holds_all_modules:
            raise ConfigError(
                "modules", name, "holds a part of its modules only", "grow it before sharding"
            )
        if layer.aggregation.per_choice and layer.router.top_k == layer.experts.num_modules:
            kind = type(layer.aggregation).__name__
            raise ConfigError(
                "aggregation",
                kind,
                "has parameters for each of the modules there are",
                "use weighted_sum or attention",
            )
        check_can_grow(layer.router)
    for layer in found.values():
        grow_router(layer.router, count, seed)
    before = sizes.pop()
    for layer in found.values():
        layer.experts.add_modules(count)
    return range(before, before + count)


def freeze_all_but(
    model: nn.Module, module: int, optimizer: torch.optim.Optimizer
) -> Callable[[], None]:
    """From now on steps of `optimizer` change module `module` (its global id) of every bank, and nothing else.

    Everything but the banks is frozen (`select(model, "one_module")`). After sharding, on every rank; `optimizer` holds the banks'
    parameters. Returns what ends it. Raises ConfigError for a module that is not there, or that FSDP2 has split.
    """
    for name, layer in adapter_layers(model).items():
        if not 0 <= module < layer.experts.num_modules:
            allowed = f"{name} has the modules 0 to {layer.experts.num_modules - 1}"
            raise ConfigError("module", module, allowed, "name one of them, or grow the bank")
        if any(type(parameter.data) is not Tensor for parameter in layer.experts.parameters()):
            allowed = f"splits the modules at {name} among the ranks, and the bits of whole ones are put back here"
            raise ConfigError("parallel.mode", "fsdp", allowed, "use ddp")
    select_trainable(model, "one_module")
    handles: list[Any] = []
    kept: list[tuple[nn.Parameter, Tensor, Tensor]] = []
    for layer in adapter_layers(model).values():
        bank = layer.experts
        for parameter in bank.parameters():
            others_e = torch.arange(len(parameter), device=parameter.device) + bank.first != module
            kept.append((parameter, others_e, parameter.detach()[others_e].clone()))
            handles.append(parameter.register_hook(_zero_gradient_of(others_e)))  # type: ignore[no-untyped-call]

    def put_back(*_: object) -> None:
        with torch.no_grad():
            for parameter, others_e, value in kept:
                parameter[others_e] = value

    handles.append(optimizer.register_step_post_hook(put_back))

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end


def _zero_gradient_of(others_e: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.masked_fill(
        others_e.view(-1, *[1] * (gradient.dim() - 1)), 0.0
    )


GROWABLE = TopKRouter | AdaptiveRouter | DenseRouter


def check_can_grow(router: RouterModule) -> None:
    """Raises ConfigError for a router whose old choices would become others (hash, group_limited, expert_choice, noisy)."""
    if isinstance(router, PerSequence | PerTask):
        check_can_grow(router.router)
    elif not isinstance(router, GROWABLE | ConstantRouter | TableRouter | FixedRouter):
        allowed = "would send old tokens to other modules if it grew"
        raise ConfigError(
            "router",
            type(router).__name__,
            allowed,
            "use top_k, soft, adaptive, fixed, a table or constant weights",
        )


def grow_router(router: RouterModule, count: int, seed: int, *, std: float = 0.02) -> None:
    """`count` more modules to choose from.

    A learned matrix gets `count` rows drawn for (seed, layer, id): the logits of the others stay as they are, but a softmax over
    more of them gives each a little less. A table keeps its rows (`add_row` gives the new module to a label); constant weights get
    zeros.

    Raises: ConfigError for a router that cannot grow (`check_grows`); it is as it was then.
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
        router.bias_E = _with_zeros(router.bias_E, count)
    elif isinstance(router, ConstantRouter):
        router.weights += (0.0,) * count
        router.weight_M = _with_zeros(router.weight_M, count)
    router.num_experts = first + count
    if isinstance(router, DenseRouter | ConstantRouter):
        router.top_k = router.num_experts


def _with_zeros(value_E: Tensor, count: int) -> Tensor:
    return torch.cat([value_E, value_E.new_zeros(count)])
