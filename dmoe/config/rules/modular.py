"""Modules (adapters) on a base model: settings that mean nothing together."""

from __future__ import annotations

import math

from dmoe.config.errors import ConfigError
from dmoe.config.router_kinds import ROUTERS
from dmoe.config.rules.layer import check_router
from dmoe.config.schema import Config, ModularConfig, RouterConfig

ROUTER_FIELDS = {
    "moe.router.kind": "modular.routing",
    "moe.router": "modular",
    "moe.top_k": "modular.top_k",
    "moe.num_experts": "modular.modules",
}
"""Fields of a MoE layer's router -> those of a bank's router."""
IGNORE_WEIGHTS = ("mean", "gated")
"""Aggregations that do not read the router's weights."""
WITH_PARAMETERS = ("concat", "gated", "attention")
"""Aggregations with parameters of their own."""
PREFIX_BANKS = ("prompt", "prefix")
"""Banks that put positions in front of a sequence."""
DEFAULT_TARGETS = {
    "low_rank": "*.attention.w_*",
    "sparse_delta": "*.attention.w_*",
    "adapter": "*.feed_forward",
    "scale": "*.feed_forward",
    "prompt": "embedding",
    "prefix": "*.attention.w_qkv",
}
"""Pattern of the target submodules of each bank."""


def check_modules_used(modular: ModularConfig) -> None:
    """Refuse settings of modules without a bank. `core` alone means something: other weights.

    Raises:
        ConfigError: for the first such field.
    """
    if modular.bank != "none":
        return
    for field, default in vars(ModularConfig()).items():
        value = getattr(modular, field)
        if field != "core" and value != default:
            allowed = "has no meaning without modules (modular.bank=none)"
            raise ConfigError(
                f"modular.{field}", value, allowed, "set modular.bank, e.g. to low_rank"
            )


def check_modular(config: Config) -> None:
    """Refuse settings of modules that do not fit together.

    Raises:
        ConfigError: the first reason found.
    """
    if config.modular.bank != "none":
        if config.data.document_mask and config.modular.bank in PREFIX_BANKS:
            raise prefix_error(config.modular.bank)
        _check_routing(config)
        _check_aggregation(config.modular)
        _check_trained(config)


def prefix_error(bank: str) -> ConfigError:
    """Return the error for positions in front of a sequence that only its first document sees."""
    allowed = f"hides the positions of modular.bank={bank} from all documents but the first"
    return ConfigError("data.document_mask", True, allowed, "use data.document_mask=false")


def modules_per_token(modular: ModularConfig) -> int:
    """Return K, the maximum number of modules per token."""
    if modular.routing == "table":
        return max(map(len, modular.table), default=1)
    all_modules = modular.routing == "constant" or ROUTERS[modular.routing].all_experts
    return modular.modules if all_modules else modular.top_k


def is_learned(modular: ModularConfig) -> bool:
    """Return whether the routing has a trained gate."""
    return modular.routing in ROUTERS and ROUTERS[modular.routing].learned


def router_config(modular: ModularConfig) -> RouterConfig:
    """Return the router settings of a learned or fixed routing."""
    assert modular.routing != "constant", "constant routing has no settings"
    assert modular.routing != "table", "table routing has no settings"
    spec, renormalize = ROUTERS[modular.routing], modular.renormalize
    if renormalize is None:
        renormalize = spec.ranks_experts and not spec.variable_k and modular.top_k > 1
    return RouterConfig(
        kind=modular.routing, score=modular.score, renormalize=renormalize, top_p=modular.top_p
    )


def _check_routing(config: Config) -> None:
    modular = config.modular
    if modular.routing == "table":
        _check_table(modular)
    elif modular.routing == "constant":
        _check_weights(modular)
    elif modules_per_token(modular) > modular.modules:
        allowed = f"must be at most modular.modules={modular.modules}"
        raise ConfigError("modular.top_k", modular.top_k, allowed, f"use {modular.modules} or less")
    else:
        try:
            check_router(router_config(modular), modular.modules, modules_per_token(modular))
        except ConfigError as error:
            raise error.renamed(ROUTER_FIELDS) from None
    if is_learned(modular):
        _check_learned(config)


def _check_weights(modular: ModularConfig) -> None:
    weights = modular.weights
    if weights and len(weights) != modular.modules:
        allowed = f"must have one weight for each of modular.modules={modular.modules}"
        raise ConfigError("modular.weights", weights, allowed, f"give {modular.modules} numbers")
    if not all(map(math.isfinite, weights)):
        allowed = "must be finite numbers"
        raise ConfigError("modular.weights", weights, allowed, "e.g. 0.5 each for two")


def _check_table(modular: ModularConfig) -> None:
    if not any(modular.table):
        allowed = "must name the modules of each domain for modular.routing=table"
        raise ConfigError("modular.table", modular.table, allowed, "e.g. [[0], [1], [0, 1]]")
    last, longest = modular.modules - 1, max(map(len, modular.table))

    def is_set(row: list[int]) -> bool:
        return len(set(row)) == len(row) and all(0 <= module <= last for module in row)

    for row in modular.table:
        if not is_set(row):
            allowed = (
                f"has the row {row}, which must name modules from 0 to {last}, each at most once"
            )
            fix = "name existing modules, or raise modular.modules"
            raise ConfigError("modular.table", modular.table, allowed, fix)
    for row in modular.compositions:
        if not is_set(row) or len(row) > longest:
            allowed = (
                f"has {row}, but takes modules 0 to {last}, each once, at most {longest} (as the "
                "longest row)"
            )
            fix = "name existing modules"
            raise ConfigError("modular.compositions", modular.compositions, allowed, fix)


def _check_learned(config: Config) -> None:
    modular, balance = config.modular, config.moe.balance
    if (modular.per == "task") != (modular.labels is not None):
        allowed = "is the number of domains, needed for modular.per=task and for nothing else"
        fix = "set it, e.g. to 2, or use another modular.per"
        raise ConfigError("modular.labels", modular.labels, allowed, fix)
    looks_ahead = modular.per == "sequence" and modular.first != 1
    if looks_ahead and not config.moe.router.allow_future_leak:
        allowed = "routes a token by later ones of its sequence, which a causal model must not"
        fix = "use 1, or accept it with moe.router.allow_future_leak=true"
        raise ConfigError("modular.first", modular.first, allowed, fix)
    if balance.switch and balance.switch_level == "global":
        allowed = (
            "is not known for modules with a learned router, whose counts of earlier accumulation "
            "steps are not kept"
        )
        fix = "use micro_batch or sequence"
        raise ConfigError("moe.balance.switch_level", "global", allowed, fix)
    if balance.load and not ROUTERS[modular.routing].has_noise:
        allowed = (
            "needs the noisy router for the modules too, which have "
            f"modular.routing={modular.routing}"
        )
        fix = "use modular.routing=noisy, or 0"
        raise ConfigError("moe.balance.load", balance.load, allowed, fix)


def _check_aggregation(modular: ModularConfig) -> None:
    kind, learned = modular.aggregation, is_learned(modular)
    if kind in IGNORE_WEIGHTS and learned:
        allowed = (
            f"does not read the weights of modular.routing={modular.routing}, whose router would "
            "learn nothing"
        )
        fix = "use weighted_sum, or a routing that is not learned"
        raise ConfigError("modular.aggregation", kind, allowed, fix)
    after_output = modular.bank == "adapter" and modular.reads == "output"
    if kind == "stacked" and not (modular.bank == "scale" or after_output):
        allowed = (
            "lets each module read what the one before made, so it needs modules that read the "
            "frozen output"
        )
        fix = "use modular.bank=adapter or scale"
        raise ConfigError("modular.aggregation", kind, allowed, fix)
    if modular.bank in PREFIX_BANKS and learned and modular.per != "task":
        allowed = (
            f"reads the whole sequence for modular.bank={modular.bank}, which a causal model must "
            "not"
        )
        fix = "use task, or a routing that is not learned"
        raise ConfigError("modular.per", modular.per, allowed, fix)
    if kind == "parameter_mean" and learned and modular.per == "token":
        allowed = (
            "takes the mean of the weights over a whole sequence, which a causal model must not "
            "for modular.per=token"
        )
        fix = "use modular.per=sequence or task"
        raise ConfigError("modular.aggregation", kind, allowed, fix)


def _check_trained(config: Config) -> None:
    modular, fsdp = config.modular, config.parallel.mode == "fsdp"
    has_parameters = is_learned(modular) or modular.aggregation in WITH_PARAMETERS
    if modular.train == "router" and not has_parameters:
        allowed = (
            f"trains nothing: modular.routing={modular.routing} and {modular.aggregation} have no "
            "parameters"
        )
        fix = "use a learned routing, or modules"
        raise ConfigError("modular.train", "router", allowed, fix)
    if modular.train == "one_module":
        last = modular.modules - 1
        if modular.module is not None and not 0 <= modular.module <= last:
            allowed = f"must be one of the modules 0 to {last}"
            raise ConfigError("modular.module", modular.module, allowed, f"use {last}")
        if fsdp:
            allowed = "does not work with modular.train=one_module: FSDP2 cuts modules into pieces"
            raise ConfigError("parallel.mode", "fsdp", allowed, "use ddp")
    if modular.aggregation == "parameter_mean" and fsdp:
        allowed = (
            "does not work with modular.aggregation=parameter_mean, which reads parameters outside "
            "their module's forward"
        )
        raise ConfigError("parallel.mode", "fsdp", allowed, "use ddp")
