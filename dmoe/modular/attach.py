"""Attach adapter layers to the submodules of any network, and detach them.

A target module is a submodule whose name matches a pattern. Its adapter layer becomes its child
`modular`, called by a forward hook on the target. No part of the network is replaced: names,
weights and attributes stay, and `detach` restores the network bit for bit.

A hook is not called where a parent reads a child's weight without calling the child. Known cases
are refused; any other raises an error in the first forward.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.config.schema import BalanceConfig
from dmoe.config.schema.constraints import check_bounds, check_types
from dmoe.modular.aggregation import Aggregation, WeightedSum
from dmoe.modular.banks.base import AdapterBank
from dmoe.modular.layer import AdapterLayer, register_hooks
from dmoe.modular.routing import RouterMaker
from dmoe.moe.experts import FeedForward
from dmoe.moe.layer import MoE
from dmoe.moe.routing import EMPTY_CONTEXT, TokenContext

CHILD = "modular"
"""Name of the child that holds the adapter layer. Paths that contain it are not base model."""
BankMaker = Callable[[int, int], AdapterBank]
"""(in_dim, out_dim) -> bank, e.g. `partial(LoRA, 4, rank=8)`."""
AggregationMaker = Callable[[int, int, int], Aggregation]
"""(width, router_dim, top_k) -> aggregation: a class, or a partial of it."""


def attach(
    model: nn.Module,
    pattern: str | re.Pattern[str],
    bank: BankMaker,
    router: RouterMaker,
    aggregation: AggregationMaker = WeightedSum,
    *,
    width: tuple[int, int] | None = None,
    seed: int = 0,
) -> dict[str, AdapterLayer]:
    """Attach an adapter layer to every submodule whose name matches the pattern.

    Call it before `shard_experts` and before the optimizer is created.

    Args:
        model: any network; changed in place.
        pattern: pattern of submodule names, e.g. `*.attention.w_out`: shell-like, or a compiled
            regular expression that matches the whole name.
        bank: creates the bank of modules of a target, given its widths.
        router: creates the router of a target.
        aggregation: creates the aggregation of a target.
        width: (in, out) of the targets. Read from Linear, Embedding and dmoe's feed-forward
            modules; required for any other module.
        seed: seed of the initial weights, which are keyed by the index of the target too.

    Returns:
        The new layers by the name of their target.

    Raises:
        ConfigError: if nothing matches, a target is not supported, or bank, router and aggregation
            do not fit each other. Then nothing is attached.
    """
    first = len(adapter_layers(model))
    attached: dict[str, AdapterLayer] = {}
    for name, target in matching_modules(model, pattern).items():
        _check_target(model, name, target)
        index = first + len(attached)
        layer = _build_layer(target, name, bank, router, aggregation, width, index)
        device, dtype = _device_and_dtype(target, model)
        layer.to(device=device, dtype=dtype).train(model.training)
        # `bind` reads the target and may raise, so it is called before anything is attached
        _initialize_layer(target, layer, seed)
        attached[name] = layer
    for name, layer in attached.items():
        target = model.get_submodule(name)
        target.add_module(CHILD, layer)
        register_hooks(model, name, target, layer)
    return attached


def initialize(model: nn.Module, seed: int) -> None:
    """Initialize all modules, routers and aggregations as `attach` does.

    After `to_empty`, and after the weights of the base model are initialized.
    """
    for name, layer in adapter_layers(model).items():
        _initialize_layer(model.get_submodule(name), layer, seed)


def _initialize_layer(target: nn.Module, layer: AdapterLayer, seed: int) -> None:
    layer.experts.bind(target)
    layer.initialize(seed)


def detach(model: nn.Module) -> dict[str, AdapterLayer]:
    """Remove all adapter layers and return them by target name.

    The model is bit for bit what it was before `attach`.
    """
    detached = adapter_layers(model)
    for name, layer in detached.items():
        for handle in layer.__dict__.pop("handles"):
            handle.remove()
        delattr(model.get_submodule(name), CHILD)
    return detached


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Return all attached layers by target name, in the model's order."""
    ending = f".{CHILD}"
    return {
        f".{name}".removesuffix(ending).removeprefix("."): module
        for name, module in model.named_modules()
        if isinstance(module, AdapterLayer) and f".{name}".endswith(ending)
    }


def module_losses(model: nn.Module, balance: BalanceConfig) -> dict[str, dict[str, Tensor]]:
    """Return the load-balancing losses of the learned routers in the latest forward.

    Args:
        model: a network with adapter layers.
        balance: enabled losses and their coefficients.

    Returns:
        For each target that was called, this rank's unweighted share of each enabled loss by name
        (see `AdapterLayer.losses`). The sum of the shares over all ranks is the loss.
    """
    check_types(balance, "balance.")
    check_bounds(balance, "balance.")
    if balance.bias:
        allowed = "is no loss, and nothing here would move the routers' biases"
        raise ConfigError("balance.bias", balance.bias, allowed, "set it to 0")
    return {
        name: layer.losses(balance)
        for name, layer in adapter_layers(model).items()
        if layer.last_routing is not None
    }


@contextmanager
def adapter_context(
    model: nn.Module, context: TokenContext | None = None, **fields: Tensor
) -> Iterator[None]:
    """Set the token context of all adapter layers: `with adapter_context(model, label_T=labels):`.

    For models whose forward takes no `TokenContext`. Labels are int64, one per token or one per
    sequence. Where blocks are recomputed, the backward belongs inside too.
    """
    given = EMPTY_CONTEXT if context is None else context
    context = replace(given, **fields)  # type: ignore[arg-type]
    layers = adapter_layers(model).values()
    before = [layer.context for layer in layers]
    for layer in layers:
        layer.context = context
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.context = old


def matching_modules(model: nn.Module, pattern: str | re.Pattern[str]) -> dict[str, nn.Module]:
    """Return the submodules whose names match, in the model's order, without attached ones.

    Raises: ConfigError if there is none.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if CHILD not in name.split(".")
        and (
            fnmatchcase(name, pattern)
            if isinstance(pattern, str)
            else pattern.fullmatch(name) is not None
        )
    }
    if not found:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        examples = ", ".join(linear[:3]) or "those of named_modules()"
        raise ConfigError(
            "pattern",
            pattern if isinstance(pattern, str) else pattern.pattern,
            "matches no submodule",
            f"submodules have names like {examples}",
        )
    return found


def _check_target(model: nn.Module, name: str, target: nn.Module) -> None:
    """Raise ConfigError for a target whose hook would not be called, or not have the effect."""
    if hasattr(target, CHILD):
        allowed = f"{name} has modules already"
        raise ConfigError("pattern", name, allowed, "detach them, or match other modules")
    for path, module in model.named_modules():
        if path.rpartition(".")[2] == CHILD and not isinstance(module, AdapterLayer):
            allowed = (
                f"is a name the model uses itself, at {path}: "
                "that part would be left out of the base model's hash"
            )
            raise ConfigError("pattern", CHILD, allowed, "rename it in the model")
    if isinstance(target, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        why = f"is a {type(target).__name__}, which would treat the adapter layer as a member"
        raise ConfigError("pattern", name, why, "attach to one of its members, or wrap it")
    parent = model.get_submodule(name.rpartition(".")[0]) if name else None
    if isinstance(parent, FeedForward | nn.MultiheadAttention):
        why = f"is never called: {type(parent).__name__} reads its weight"
        raise ConfigError("pattern", name, why, f"attach to {name.rpartition('.')[0]} itself")


def _build_layer(
    target: nn.Module,
    name: str,
    bank_maker: BankMaker,
    router_maker: RouterMaker,
    aggregation_maker: AggregationMaker,
    width: tuple[int, int] | None,
    index: int,
) -> AdapterLayer:
    """Build the layer of one target. Raises ConfigError if its parts do not fit each other."""
    in_dim, out_dim = _target_widths(target, name) if width is None else width
    bank = bank_maker(in_dim, out_dim)
    if isinstance(target, nn.Embedding) and bank.input_kind == "input":
        allowed = f"reads the input of {name or 'the model'}, which is ids, not vectors"
        fix = "use Prompt, or a bank that reads the output: Adapter, Scale"
        raise ConfigError("bank", type(bank).__name__, allowed, fix)
    router_dim = out_dim if bank.input_kind == "sequence" else bank.row_dim
    router = router_maker(router_dim, index)
    if router.num_experts != bank.num_modules:
        allowed = f"must be the {bank.num_modules} modules of the bank"
        fix = "give both the same number of modules"
        raise ConfigError("router.num_experts", router.num_experts, allowed, fix)
    aggregation = aggregation_maker(bank.width, router_dim, router.top_k)
    kind = type(aggregation).__name__
    if aggregation.sequential and bank.input_kind != "output":
        allowed = f"needs modules that read the frozen output, not the {bank.input_kind}"
        raise ConfigError("aggregation", kind, allowed, "use Adapter or Scale, or another one")
    if not aggregation.uses_weights and any(True for _ in router.parameters()):
        allowed = f"ignores the weights of {type(router).__name__}, which would not be trained"
        fix = "use weighted_sum, or a router without parameters"
        raise ConfigError("aggregation", kind, allowed, fix)
    return AdapterLayer(bank, router, aggregation, index)


def _target_widths(target: nn.Module, name: str) -> tuple[int, int]:
    if isinstance(target, nn.Linear):
        return target.in_features, target.out_features
    if isinstance(target, nn.Embedding):
        return 1, target.embedding_dim
    if isinstance(target, FeedForward):
        return target.w_in.in_features, target.w_out.out_features
    if isinstance(target, MoE):
        matrices = target.experts.matrices[0]
        return matrices[0][0], matrices[-1][1]
    allowed = f"is not known for {name or 'the model'}, a {type(target).__name__}"
    raise ConfigError("width", None, allowed, "give width=(in, out)")


def _device_and_dtype(target: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return those of the first floating-point weight of target or model; at least float32."""
    for module in (target, model):
        for parameter in module.parameters():
            if parameter.is_floating_point():
                return parameter.device, torch.promote_types(parameter.dtype, torch.float32)
    return torch.device("cpu"), torch.get_default_dtype()
