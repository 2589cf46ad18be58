"""From `modular` in the config to modules on the model.

On the meta device, before `shard_experts`: a rank never holds a module that is not its own.

What a `train` line says of the modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.config.rules.modular import DEFAULT_TARGETS, choices, is_learned, router_of
from dmoe.config.schema import BalanceConfig, Config, ModelConfig, ModularConfig
from dmoe.models.base import IGNORE_INDEX, Model, ModelOutput
from dmoe.models.transformer import Transformer
from dmoe.modular import (
    AGGREGATIONS,
    BANKS,
    attach,
    constant,
    initialize,
    adapter_layers,
    routed,
    select_trainable,
    table,
    with_prefix_tokens,
)
from dmoe.modular.attach import BankMaker
from dmoe.modular.routing import PerSequence, PerTask, RouterMaker
from dmoe.moe.metrics import LayerStats
from dmoe.moe.routers.base import RouterModule
from dmoe.moe.routing import TokenContext
from dmoe.train.reduction import LayerTotals, ReducedStep

BANK_FIELDS: dict[str, tuple[str, ...]] = {
    "low_rank": ("rank", "alpha"),
    "adapter": ("hidden", "reads"),
    "prompt": ("length",),
    "prefix": ("length",),
    "scale": (),
    "sparse_delta": ("density",),
}
"""The fields of `modular` that are arguments of a bank."""


def attach_modules(model: nn.Module, config: Config, virtual_ranks: int = 1) -> None:
    """Put the modules of the config on a model that has none; nothing where the config has none.

    Raises: ConfigError for a pattern that names nothing, or a place that cannot have such modules.
    """
    modular = config.modular
    if modular.bank == "none":
        return
    bank, router = _bank(modular, config.model), _router(modular)
    try:
        made = attach(
            model, target_pattern(modular), bank, router, AGGREGATIONS[modular.aggregation]
        )
    except ConfigError as error:
        raise _config_error(error, modular) from None
    for layer in made.values():
        layer.virtual_ranks = virtual_ranks
    if room := max(layer.experts.num_prefix_tokens for layer in made.values()):
        add_prefix_positions(model, room)
    collect_module_outputs(model, config.moe.balance)


def target_pattern(modular: ModularConfig) -> str:
    return DEFAULT_TARGETS[modular.bank] if modular.at is None else modular.at


def initialize_modules(model: nn.Module, config: Config) -> None:
    """The first weights of modules, routers and aggregations, as a function of the seed; after `to_empty`."""
    if config.modular.bank != "none":
        initialize(model, config.train.seed)


def select_trainable_parameters(model: nn.Module, config: Config) -> None:
    """Say by `requires_grad` what is trained. Before DDP or FSDP2 sees the model, and before the optimizer."""
    if config.modular.bank != "none":
        select_trainable(model, config.modular.train)


def freezes_base_model(config: Config) -> bool:
    return config.modular.bank != "none" and config.modular.train != "joint"


def _bank(modular: ModularConfig, model: ModelConfig) -> BankMaker:
    options: dict[str, Any] = {name: getattr(modular, name) for name in BANK_FIELDS[modular.bank]}
    kind = BANKS[modular.bank]

    def make(in_dim: int, out_dim: int) -> Any:
        if modular.bank == "prefix":  # behind the queries: keys and values
            queries = model.heads * (model.head_dim or model.dim // model.heads)
            return kind(modular.modules, in_dim, out_dim, columns=(queries, out_dim), **options)  # type: ignore[call-arg]
        return kind(modular.modules, in_dim, out_dim, **options)

    return make


def _router(modular: ModularConfig) -> RouterMaker:
    if modular.routing == "constant":
        return constant(*(modular.weights or [1.0 / modular.modules] * modular.modules))
    if modular.routing == "table":
        return table(modular.table, modular.modules)
    settings = router_of(modular)
    return partial(
        routed(
            modular.routing,
            modular.modules,
            choices(modular),
            per=modular.per,
            first=modular.first if modular.per == "sequence" else None,
            labels=modular.labels,
            score=settings.score,
            renormalize=settings.renormalize,
            top_p=settings.top_p,
        )
    )


def _config_error(error: ConfigError, modular: ModularConfig) -> ConfigError:
    """The library names its arguments; a user knows fields."""
    if error.field == "pattern":
        pattern = target_pattern(modular)
        allowed = error.allowed
        if error.value != pattern:
            allowed = f"names {error.value}, which {allowed}"
        return ConfigError("modular.at", pattern, allowed, error.fix)
    if error.field == "width":
        allowed = f"names a place whose width {error.allowed}"
        return ConfigError("modular.at", target_pattern(modular), allowed, "name Linear layers")
    return ConfigError(f"modular.{error.field}", error.value, error.allowed, error.fix)


def bias_balanced_routers(
    model: Model, config: Config, totals: ReducedStep
) -> Iterator[tuple[RouterModule, LayerTotals]]:
    """The routers whose bias the controller moves, with what their layers counted: none of a frozen core, none beside one module."""
    if not freezes_base_model(config):
        yield from zip((layer.router for layer in model.moe_layers()), totals.layers, strict=True)
    if is_learned(config.modular) and config.modular.train != "one_module":
        for layer, seen in zip(adapter_layers(model).values(), totals.modules, strict=True):
            router = layer.router
            yield (router.router if isinstance(router, PerSequence | PerTask) else router), seen


def module_metrics(model: nn.Module, totals: ReducedStep) -> dict[str, Any]:
    """`modules`: for each place how often each module was chosen, and the losses of its router. Empty without modules."""
    if not totals.modules:
        return {}
    told = zip(adapter_layers(model), totals.modules, strict=True)
    return {
        "modules": [
            {
                "place": place,
                "load": seen.choice_counts,
                "load_max_over_mean": seen.load_max_over_mean,
                "aux": seen.aux,
            }
            for place, seen in told
        ]
    }


def collect_module_outputs(model: nn.Module, balance: BalanceConfig) -> None:
    """From now on the outputs of `model` have `module_aux` and `module_stats`. After `attach`, before the model is wrapped."""
    model.register_forward_hook(partial(_append_module_outputs, balance))


def _append_module_outputs(
    balance: BalanceConfig, model: nn.Module, args: tuple[Any, ...], output: ModelOutput
) -> None:
    if model.training:
        for layer in adapter_layers(model).values():
            output.module_aux.append(layer.losses(balance))
            output.module_stats.append(layer.stats())


def add_prefix_positions(model: nn.Module, length: int) -> None:
    """From now on every forward of `model` has `length` positions more in front. After `attach`, before the model is wrapped.

    Raises: ConfigError for a model that reads no tokens.
    """
    if not isinstance(model, Transformer):
        allowed = "stands in front of tokens, which this model does not read"
        raise ConfigError(
            "modular.bank", "prompt", allowed, "use low_rank, adapter, scale or sparse_delta"
        )
    # in front of the hooks of `attach`, which are to hear of the longer sequences
    model.register_forward_pre_hook(partial(_prepend_prefix, length), with_kwargs=True, prepend=True)
    model.register_forward_hook(partial(_strip_prefix, length), with_kwargs=True)


def _prepend_prefix(
    length: int, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    names = ("input", "target", "context")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    sequences = len(given["input"])
    given["input"] = with_prefix_tokens(given["input"], length)
    if given.get("target") is not None:
        given["target"] = with_prefix_tokens(given["target"], length, IGNORE_INDEX)
    if given.get("context") is not None:
        given["context"] = _context_with_prefix(given["context"], sequences, length)
    return (), given


def _context_with_prefix(context: TokenContext, sequences: int, length: int) -> TokenContext:
    """What holds for the first token of a sequence holds for the positions in front of it."""

    def longer(value_T: Tensor | None) -> Tensor | None:
        if value_T is None:
            return None
        value_BS = value_T.view(sequences, -1)
        return torch.cat([value_BS[:, :1].expand(-1, length), value_BS], 1).flatten()

    return replace(context, label_T=longer(context.label_T), valid_T=longer(context.valid_T))


def _strip_prefix(
    length: int, model: nn.Module, args: Any, kwargs: Mapping[str, Any], output: ModelOutput
) -> ModelOutput:
    sequences = len(kwargs["input"])

    def cut(value_TX: Tensor) -> Tensor:
        return value_TX.view(sequences, -1, *value_TX.shape[1:])[:, length:].flatten(0, 1)

    def without(stats: LayerStats) -> LayerStats:
        """What an observer told of each token; sums stay sums over all positions."""
        return replace(
            stats,
            observed={name: cut(v) if "_T" in name else v for name, v in stats.observed.items()},
        )

    return replace(
        output,
        logits=None if output.logits is None else output.logits[:, length:],
        loss_T=None if output.loss_T is None else cut(output.loss_T),
        correct_T=None if output.correct_T is None else cut(output.correct_T),
        stats=[without(stats) for stats in output.stats],
    )
