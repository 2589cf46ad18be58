"""Attach the modules of a config (section `modular`) to the model, and report their metrics.

Modules are attached on the meta device, before `shard_experts`, so a rank never holds modules of
other ranks.

Prompts and prefixes need P positions before each sequence. The model still gets S tokens per
sequence and returns S positions, in training, evaluation and `dmoe generate`; inside, it computes
P + S. Prefix positions have no target, and the label and validity of their sequence. The mixture
layers route and count them like any token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.config.rules.modular import DEFAULT_TARGETS, is_learned, modules_per_token, router_config
from dmoe.config.schema import BalanceConfig, Config, ModelConfig, ModularConfig
from dmoe.models.base import IGNORE_INDEX, Model, ModelOutput
from dmoe.models.transformer import Transformer
from dmoe.modular import (
    AGGREGATIONS,
    BANKS,
    adapter_layers,
    attach,
    constant,
    initialize,
    routed,
    select_trainable,
    table,
    with_prefix_tokens,
)
from dmoe.modular.attach import BankMaker
from dmoe.modular.routing import PerSequence, PerTask, RouterMaker
from dmoe.moe.metrics import LayerStats
from dmoe.moe.routing import TokenContext
from dmoe.train.optimizer import check_name_patterns
from dmoe.train.reduction import LayerTotals, ReducedStep

BANK_FIELDS: dict[str, tuple[str, ...]] = {
    "low_rank": ("rank", "alpha"),
    "adapter": ("hidden", "reads"),
    "prompt": ("length",),
    "prefix": ("length",),
    "scale": (),
    "sparse_delta": ("density",),
}
"""Fields of `modular` that are arguments of a bank, per kind."""
ARGUMENT_NAMES = {"reads": "input_kind"}
"""Arguments whose name differs from the field."""


def attach_modules(model: nn.Module, config: Config, virtual_ranks: int = 1) -> None:
    """Attach the modules of the config, if it has any, to a model without modules.

    `virtual_ranks` is the number of token groups per rank in losses of level `micro_batch`.

    Raises: ConfigError for a pattern without matches or a target that is not supported.
    """
    modular = config.modular
    if modular.bank == "none":
        return
    bank, router = _bank(modular, config.model), _router(modular)
    try:
        attached = attach(
            model, target_pattern(modular), bank, router, AGGREGATIONS[modular.aggregation]
        )
    except ConfigError as error:
        raise _config_error(error, modular) from None
    for layer in attached.values():
        layer.virtual_ranks = virtual_ranks
    num_prefix_tokens = max(layer.experts.num_prefix_tokens for layer in attached.values())
    if num_prefix_tokens:
        add_prefix_positions(model, num_prefix_tokens)
    collect_module_outputs(model, config.moe.balance)


def target_pattern(modular: ModularConfig) -> str:
    """Return the pattern of target module names: `modular.at`, or the bank's default."""
    return DEFAULT_TARGETS[modular.bank] if modular.at is None else modular.at


def initialize_modules(model: nn.Module, config: Config) -> None:
    """Initialize modules, routers and aggregations from the seed, after `to_empty`."""
    if config.modular.bank != "none":
        initialize(model, config.train.seed)


def select_trainable_parameters(model: Model, config: Config) -> None:
    """Set `requires_grad` by `modular.train`, `optim.trainable` and `moe.router.freeze`.

    Before DDP or FSDP2 and the optimizer are set up.

    Raises:
        ConfigError: a pattern of `optim.trainable` that matches no parameter.
    """
    if config.modular.bank != "none":
        select_trainable(model, config.modular.train)
    if config.optim.trainable:
        _train_only(model, config.optim.trainable)
    if config.moe.router.freeze:
        for layer in model.moe_layers():
            layer.router.requires_grad_(False)


def _train_only(model: Model, patterns: list[str]) -> None:
    """Freeze what no pattern matches; factors of LoRA are trained in any case."""
    check_name_patterns(model, patterns, "optim.trainable")
    for name, parameter in model.named_parameters():
        matches = any(fnmatchcase(name, pattern) for pattern in patterns)
        parameter.requires_grad_(matches or name.rpartition(".")[2].startswith("lora_"))


def freezes_base_model(config: Config) -> bool:
    """Return True if the base model is not trained."""
    return config.modular.bank != "none" and config.modular.train != "joint"


def _bank(modular: ModularConfig, model: ModelConfig) -> BankMaker:
    options: dict[str, Any] = {
        ARGUMENT_NAMES.get(name, name): getattr(modular, name) for name in BANK_FIELDS[modular.bank]
    }
    kind = BANKS[modular.bank]

    def make(in_dim: int, out_dim: int) -> Any:
        if modular.bank == "prefix":
            # `w_qkv` stacks queries, keys and values: skip the queries
            queries = model.heads * (model.head_dim or model.dim // model.heads)
            options["columns"] = (queries, out_dim)
        return kind(modular.modules, in_dim, out_dim, **options)

    return make


def _router(modular: ModularConfig) -> RouterMaker:
    if modular.routing == "constant":
        return constant(*(modular.weights or [1.0 / modular.modules] * modular.modules))
    if modular.routing == "table":
        return table(modular.table, modular.modules)
    settings = router_config(modular)
    return partial(
        routed(
            modular.routing,
            modular.modules,
            modules_per_token(modular),
            per=modular.per,
            first=modular.first if modular.per == "sequence" else None,
            labels=modular.labels,
            score=settings.score,
            renormalize=settings.renormalize,
            top_p=settings.top_p,
        )
    )


def _config_error(error: ConfigError, modular: ModularConfig) -> ConfigError:
    """Return the error of `attach`, which names arguments, with the names of config fields."""
    if error.field == "pattern":
        pattern = target_pattern(modular)
        allowed = error.allowed
        if error.value != pattern:
            allowed = f"names {error.value}, which {allowed}"
        return ConfigError("modular.at", pattern, allowed, error.fix)
    if error.field == "width":
        allowed = f"names a module whose width {error.allowed}"
        return ConfigError("modular.at", target_pattern(modular), allowed, "name Linear layers")
    return ConfigError(f"modular.{error.field}", error.value, error.allowed, error.fix)


def balance_biases(
    model: Model, config: Config, totals: ReducedStep
) -> Iterator[tuple[Tensor, LayerTotals]]:
    """Yield the selection biases that are updated, with the counts of their layers.

    None of a frozen base model, and none with `modular.train=one_module`.
    """
    if not freezes_base_model(config):
        biases = (layer.balance_bias for layer in model.moe_layers())
        yield from zip(biases, totals.layers, strict=True)
    if is_learned(config.modular) and config.modular.train != "one_module":
        for layer, layer_totals in zip(adapter_layers(model).values(), totals.modules, strict=True):
            router = layer.router
            learned = router.router if isinstance(router, PerSequence | PerTask) else router
            yield learned.get_buffer("bias_E"), layer_totals


def module_metrics(model: nn.Module, totals: ReducedStep) -> dict[str, Any]:
    """Return `modules` of a `train` line: per target, tokens per module and router losses.

    Empty without modules.
    """
    if not totals.modules:
        return {}
    layers = zip(adapter_layers(model), totals.modules, strict=True)
    return {
        "modules": [
            {
                "place": target,
                "load": layer_totals.choice_counts,
                "load_max_over_mean": layer_totals.load_max_over_mean,
                "aux": layer_totals.aux,
            }
            for target, layer_totals in layers
        ]
    }


def collect_module_outputs(model: nn.Module, balance: BalanceConfig) -> None:
    """Fill `module_aux` and `module_stats` of the model's outputs in training.

    Mixture layers return theirs. An adapter layer is called by a hook and cannot return anything
    else, so a hook on the whole model collects them after its forward. After `attach`, before the
    model is wrapped in DDP or FSDP2.
    """
    model.register_forward_hook(partial(_append_module_outputs, balance))


def _append_module_outputs(
    balance: BalanceConfig, model: nn.Module, args: tuple[Any, ...], output: ModelOutput
) -> None:
    if model.training:
        for layer in adapter_layers(model).values():
            output.module_aux.append(layer.losses(balance))
            output.module_stats.append(layer.stats())


def add_prefix_positions(model: nn.Module, length: int) -> None:
    """Compute `length` more positions before each sequence in every forward of `model`.

    After `attach`, before the model is wrapped in DDP or FSDP2.

    Raises: ConfigError for a model without token input.
    """
    if not isinstance(model, Transformer):
        allowed = "needs a model with token input, which this one is not"
        raise ConfigError(
            "modular.bank", "prompt", allowed, "use low_rank, adapter, scale or sparse_delta"
        )
    # before the hooks of `attach`, which must see the context of the longer sequences
    model.register_forward_pre_hook(
        partial(_prepend_prefix, length), with_kwargs=True, prepend=True
    )
    model.register_forward_hook(partial(_strip_prefix, length), with_kwargs=True)


def _prepend_prefix(
    length: int, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    names = ("input", "target", "context")
    inputs = {**dict(zip(names, args, strict=False)), **kwargs}
    sequences = len(inputs["input"])
    inputs["input"] = with_prefix_tokens(inputs["input"], length)
    if inputs.get("target") is not None:
        inputs["target"] = with_prefix_tokens(inputs["target"], length, IGNORE_INDEX)
    if inputs.get("context") is not None:
        inputs["context"] = _context_with_prefix(inputs["context"], sequences, length)
    return (), inputs


def _context_with_prefix(context: TokenContext, sequences: int, length: int) -> TokenContext:
    """Copy labels and validity of each sequence's first token to its prefix positions."""

    def prepend(value_T: Tensor | None) -> Tensor | None:
        if value_T is None:
            return None
        value_BS = value_T.view(sequences, -1)
        return torch.cat([value_BS[:, :1].expand(-1, length), value_BS], 1).flatten()

    return replace(context, label_T=prepend(context.label_T), valid_T=prepend(context.valid_T))


def _strip_prefix(
    length: int, model: nn.Module, args: Any, kwargs: Mapping[str, Any], output: ModelOutput
) -> ModelOutput:
    sequences = len(kwargs["input"])

    def cut(value_TX: Tensor) -> Tensor:
        return value_TX.view(sequences, -1, *value_TX.shape[1:])[:, length:].flatten(0, 1)

    def strip_metrics(stats: LayerStats) -> LayerStats:
        """Cut per-token metrics; sums stay sums over all positions."""
        return replace(
            stats,
            metrics={name: cut(v) if "_T" in name else v for name, v in stats.metrics.items()},
        )

    return replace(
        output,
        logits=None if output.logits is None else output.logits[:, length:],
        loss_T=None if output.loss_T is None else cut(output.loss_T),
        correct_T=None if output.correct_T is None else cut(output.correct_T),
        stats=[strip_metrics(stats) for stats in output.stats],
    )
