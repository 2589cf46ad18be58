"""Modules beside the parts of any network, and off again.

A place is a submodule, named by a pattern. Its modules become its child `modular`, and a forward hook on it calls them: nothing of the
network is replaced, so every name, weight and attribute of it stays what it was, and `detach` leaves it bit for bit as it came. A hook
is passed by where a parent reads a child's weight and does not call it: known cases are refused, and any other is told by the first
forward, instead of training modules that change nothing.
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
from dmoe.modular.aggregation import Aggregation, WeightedSum
from dmoe.modular.banks.base import AdapterBank
from dmoe.modular.layer import EMPTY_CONTEXT, AdapterLayer, register_hooks
from dmoe.modular.routing import RouterMaker
from dmoe.moe.experts import FeedForward
from dmoe.moe.layer import MoE
from dmoe.moe.routing import TokenContext

CHILD = "modular"
"""The name under which a place holds its modules; what has it in its path is no part of the core."""
BankMaker = Callable[[int, int], AdapterBank]
"""(in_dim, out_dim) -> bank, e.g. `partial(LowRank, 4, rank=8)`."""
AggregationMaker = Callable[[int, int, int], Aggregation]
"""(width, query, top_k) -> aggregation: one of the classes, or a partial of it."""


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
    """Put a bank of modules, with a router of its own, beside every submodule whose name the pattern matches.

    Args:
        pattern: of submodule names, e.g. `*.attention.w_out`: shell-like, or a compiled regular expression that matches the whole name.
        bank, router, aggregation: what makes them for the widths of a place.
        width: (in, out) of the places; read from Linear, Embedding and dmoe's feed-forwards, needed for any other module.
        seed: of the draws, which are keyed by the order of the places too.

    Returns the new layers by the name of their place. Before `shard_experts` and before the optimizer.
    Raises: ConfigError where nothing matches, something cannot be attached to, or the parts do not fit each other; then nothing is
    attached.
    """
    number = len(adapter_layers(model))
    made: dict[str, AdapterLayer] = {}
    for name, place in matching_modules(model, pattern).items():
        _check_target(model, name, place)
        layer = _build_layer(place, name, bank, router, aggregation, width, number + len(made))
        device, dtype = _device_and_dtype(place, model)
        layer.to(device=device, dtype=dtype).train(model.training)
        _initialize_layer(
            place, layer, seed
        )  # it looks at the place, and may refuse it: so before anything is attached
        made[name] = layer
    for name, layer in made.items():
        place = model.get_submodule(name)
        place.add_module(CHILD, layer)
        register_hooks(model, name, place, layer)
    return made


def initialize(model: nn.Module, seed: int) -> None:
    """Draw all modules, routers and aggregations anew, as `attach` did; after `to_empty`, when the core has its weights."""
    for name, layer in adapter_layers(model).items():
        _initialize_layer(model.get_submodule(name), layer, seed)


def _initialize_layer(place: nn.Module, layer: AdapterLayer, seed: int) -> None:
    layer.experts.bind(place)
    layer.initialize(seed)


def detach(model: nn.Module) -> dict[str, AdapterLayer]:
    """Take all modules off; returns them by the name of their place. The model is what it was before, bit for bit."""
    taken = adapter_layers(model)
    for name, layer in taken.items():
        for handle in layer.__dict__.pop("handles"):
            handle.remove()
        delattr(model.get_submodule(name), CHILD)
    return taken


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """All attached layers by the name of their place, in the model's order."""
    ending = f".{CHILD}"
    return {
        f".{name}".removesuffix(ending).removeprefix("."): module
        for name, module in model.named_modules()
        if isinstance(module, AdapterLayer) and f".{name}".endswith(ending)
    }


@contextmanager
def adapter_context(
    model: nn.Module, context: TokenContext | None = None, **fields: Tensor
) -> Iterator[None]:
    """What the modules may know of the tokens inside: `with given(model, label_T=labels): model(...)`.

    Labels are int64, one for each token or one for each sequence. For models that are not handed a `TokenContext` themselves. Backward
    belongs inside where blocks are recomputed.
    """
    context = replace(EMPTY_CONTEXT if context is None else context, **fields)  # type: ignore[arg-type]
    here = adapter_layers(model).values()
    before = [layer.context for layer in here]
    for layer in here:
        layer.context = context
    try:
        yield
    finally:
        for layer, old in zip(here, before, strict=True):
            layer.context = old


def matching_modules(model: nn.Module, pattern: str | re.Pattern[str]) -> dict[str, nn.Module]:
    """The submodules a pattern names, in the model's order, without what is attached. Raises ConfigError where there is none."""
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
        some = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][:3]
        shown = pattern if isinstance(pattern, str) else pattern.pattern
        raise ConfigError(
            "pattern",
            shown,
            "matches no submodule",
            f"submodules have names like {', '.join(some) or 'those of named_modules()'}",
        )
    return found


def _check_target(model: nn.Module, name: str, place: nn.Module) -> None:
    if hasattr(place, CHILD):
        raise ConfigError(
            "pattern", name, f"{name} has modules already", "detach them, or name other places"
        )
    for path, module in model.named_modules():
        if path.rpartition(".")[2] == CHILD and not isinstance(module, AdapterLayer):
            allowed = f"is a name the model uses itself, at {path}: that part would be left out of the core's hash"
            raise ConfigError("pattern", CHILD, allowed, "rename it in the model")
    if isinstance(place, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        why = f"is a {type(place).__name__}, which would take its modules for one more member"
        raise ConfigError("pattern", name, why, "attach to one of its members, or wrap it")
    parent = model.get_submodule(name.rpartition(".")[0]) if name else None
    if isinstance(parent, FeedForward | nn.MultiheadAttention):
        why = f"is never called: {type(parent).__name__} reads its weight"
        raise ConfigError("pattern", name, why, f"attach to {name.rpartition('.')[0]} itself")


def _build_layer(
    place: nn.Module,
    name: str,
    bank: BankMaker,
    router: RouterMaker,
    aggregation: AggregationMaker,
    width: tuple[int, int] | None,
    number: int,
) -> AdapterLayer:
    in_dim, out_dim = _target_widths(place, name) if width is None else width
    made = bank(in_dim, out_dim)
    if isinstance(place, nn.Embedding) and made.input_kind == "input":
        allowed = f"reads what {name or 'the model'} is given, which are ids and no vectors"
        raise ConfigError(
            "bank",
            type(made).__name__,
            allowed,
            "use Prompt, or what reads the output: Adapter, Scale",
        )
    query = out_dim if made.input_kind == "sequence" else made.row_dim
    chooses = router(query, number)
    if chooses.num_experts != made.num_modules:
        allowed = f"must be the {made.num_modules} modules of the bank"
        raise ConfigError(
            "router.num_experts",
            chooses.num_experts,
            allowed,
            "give both the same number of modules",
        )
    joins = aggregation(made.width, query, chooses.top_k)
    if joins.sequential and made.input_kind != "output":
        allowed = f"needs modules that read the frozen output, not the {made.input_kind}"
        raise ConfigError(
            "aggregation",
            type(joins).__name__,
            allowed,
            "use Adapter or Scale, or another aggregation",
        )
    if not joins.uses_weights and any(True for _ in chooses.parameters()):
        allowed = f"does not use the weights of {type(chooses).__name__}, which would learn nothing"
        raise ConfigError(
            "aggregation",
            type(joins).__name__,
            allowed,
            "use weighted_sum, or a router without parameters",
        )
    return AdapterLayer(made, chooses, joins, number)


def _target_widths(place: nn.Module, name: str) -> tuple[int, int]:
    if isinstance(place, nn.Linear):
        return place.in_features, place.out_features
    if isinstance(place, nn.Embedding):
        return 1, place.embedding_dim
    if isinstance(place, FeedForward):
        return place.w_in.in_features, place.w_out.out_features
    if isinstance(place, MoE):
        matrices = place.experts.matrices[0]
        return matrices[0][0], matrices[-1][1]
    raise ConfigError(
        "width",
        None,
        f"is not known for {name or 'the model'}, a {type(place).__name__}",
        "give width=(in, out)",
    )


def _device_and_dtype(place: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where, and in what, the modules of a place live: as the first floating weight of the place or of the model, at least float32."""
    for module in (place, model):
        for parameter in module.parameters():
            if parameter.is_floating_point():
                return parameter.device, torch.promote_types(parameter.dtype, torch.float32)
    return torch.device("cpu"), torch.get_default_dtype()


def module_losses(model: nn.Module, balance: BalanceConfig) -> dict[str, dict[str, Tensor]]:
    """For each place that took part in the latest forward, this rank's share of each loss in force, unweighted, by name.

    Summed over the ranks, the shares are the loss. A place with a given routing has none. See `Modular.losses`.
    """
    return {
        name: layer.losses(balance)
        for name, layer in adapter_layers(model).items()
        if layer.last_routing is not None
    }
