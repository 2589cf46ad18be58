"""Modules on the network: settings that mean nothing together, refused before torch starts."""

from __future__ import annotations

import math

from dmoe.config.errors import ConfigError
from dmoe.config.rules.router import check_router
from dmoe.config.schema import Config, ModularConfig, RouterConfig

LEARNED = ("top_k", "noisy", "soft", "adaptive")
BY_DOMAIN = ("table", "fixed")
WITHOUT_WEIGHTS = ("mean", "gated")
"""Aggregations that do not read the router's weights."""
PER_CHOICE = ("concat", "gated")
"""Aggregations with parameters for each choice."""
WITH_PARAMETERS = ("concat", "gated", "attention")
IN_FRONT = ("prompt", "prefix")
DEFAULT_PLACES = {
    "low_rank": "*.attention.w_*",
    "sparse_delta": "*.attention.w_*",
    "adapter": "*.feed_forward",
    "scale": "*.feed_forward",
    "prompt": "embedding",
    "prefix": "*.attention.w_qkv",
}
READ_BY: dict[str, tuple[str, tuple[str, ...]]] = {
    "rank": ("bank", ("low_rank",)),
    "alpha": ("bank", ("low_rank",)),
    "hidden": ("bank", ("adapter",)),
    "reads": ("bank", ("adapter",)),
    "length": ("bank", IN_FRONT),
    "density": ("bank", ("sparse_delta",)),
    "top_k": ("routing", ("top_k", "noisy", "adaptive", "fixed")),
    "per": ("routing", LEARNED),
    "score": ("routing", ("top_k",)),
    "renormalize": ("routing", ("top_k", "noisy", "adaptive")),
    "top_p": ("routing", ("adaptive",)),
    "table": ("routing", ("table",)),
    "compositions": ("routing", ("table",)),
    "weights": ("routing", ("constant",)),
    "labels": ("per", ("task",)),
    "first": ("per", ("sequence",)),
    "module": ("train", ("one_module",)),
}
"""Fields that only some settings of another field read."""


def check_modular(config: Config) -> None:
    modular = config.modular
    if modular.bank == "none":
        _nothing_else(modular)
        return
    _numbers(modular)
    for field, (other, values) in READ_BY.items():
        if (
            getattr(modular, field) != getattr(ModularConfig(), field)
            and getattr(modular, other) not in values
        ):
            allowed = f"has no meaning for modular.{other}={getattr(modular, other)}, only for {', '.join(values)}"
            raise ConfigError(
                f"modular.{field}", getattr(modular, field), allowed, f"leave modular.{field} out"
            )
    _routing(config)
    _aggregation(modular)
    _trained(config)


def choices(modular: ModularConfig) -> int:
    """K: modules a token goes to, at most."""
    if modular.routing in ("constant", "soft"):
        return modular.modules
    return max(map(len, modular.table), default=1) if modular.routing == "table" else modular.top_k


def router_of(modular: ModularConfig) -> RouterConfig:
    """The settings of the router of a learned or fixed routing."""
    renormalize = modular.renormalize
    if renormalize is None:
        renormalize = modular.routing in ("top_k", "noisy") and modular.top_k > 1
    assert modular.routing != "constant", "constant routing has no settings"
    assert modular.routing != "table", "table routing has no settings"
    return RouterConfig(
        kind=modular.routing, score=modular.score, renormalize=renormalize, top_p=modular.top_p
    )


def _nothing_else(modular: ModularConfig) -> None:
    """`core` alone has a meaning without modules: the run goes on from other weights."""
    for field, default in vars(ModularConfig()).items():
        if field != "core" and getattr(modular, field) != default:
            allowed = "has no meaning without modules (modular.bank=none)"
            raise ConfigError(
                f"modular.{field}",
                getattr(modular, field),
                allowed,
                "set modular.bank, e.g. to low_rank",
            )


def _numbers(modular: ModularConfig) -> None:
    for field in ("modules", "rank", "hidden", "length", "top_k", "first", "labels"):
        value = getattr(modular, field)
        if value is not None and not 1 <= value <= 1 << 20:
            raise ConfigError(
                f"modular.{field}", value, f"must be from 1 to {1 << 20}", "use the default"
            )
    if modular.alpha is not None and modular.alpha <= 0:
        raise ConfigError("modular.alpha", modular.alpha, "must be greater than 0", "leave it out")
    if not 0 < modular.density <= 1:
        raise ConfigError(
            "modular.density", modular.density, "must be above 0 and at most 1", "use 0.01"
        )


def _routing(config: Config) -> None:
    modular = config.modular
    if modular.routing == "table":
        _table(modular)
    elif modular.routing == "constant":
        if modular.weights and len(modular.weights) != modular.modules:
            allowed = f"must have one weight for each of modular.modules={modular.modules}"
            raise ConfigError(
                "modular.weights", modular.weights, allowed, f"give {modular.modules} numbers"
            )
        if not all(map(math.isfinite, modular.weights)):
            raise ConfigError(
                "modular.weights",
                modular.weights,
                "must be finite numbers",
                "e.g. 0.5 each for two",
            )
    elif choices(modular) > modular.modules:
        allowed = f"must be at most modular.modules={modular.modules}"
        raise ConfigError("modular.top_k", modular.top_k, allowed, f"use {modular.modules} or less")
    else:
        _check_router(modular)
    if modular.routing in LEARNED:
        _learned(config)


def _check_router(modular: ModularConfig) -> None:
    try:
        check_router(router_of(modular), modular.modules, choices(modular))
    except ConfigError as error:
        text = str(error)
        for old, new in (("moe.router.kind", "modular.routing"), ("moe.router", "modular")):
            text = text.replace(old, new)
        for old, new in (("moe.top_k", "modular.top_k"), ("moe.num_experts", "modular.modules")):
            text = text.replace(old, new)
        name, _, rest = text.partition("=")
        value, _, rest = rest.partition(": ")
        allowed, _, fix = rest.rpartition("; ")
        raise ConfigError(name, value, allowed, fix) from None


def _table(modular: ModularConfig) -> None:
    if not any(modular.table):
        raise ConfigError(
            "modular.table",
            modular.table,
            "must name the modules of each domain for modular.routing=table",
            "e.g. [[0], [1], [0, 1]]",
        )
    for row in modular.table:
        if len(set(row)) < len(row) or not all(0 <= module < modular.modules for module in row):
            allowed = f"has the row {row}, which must name modules from 0 to {modular.modules - 1}, each at most once"
            raise ConfigError(
                "modular.table",
                modular.table,
                allowed,
                "name existing modules, or raise modular.modules",
            )
    longest = max(map(len, modular.table))
    for row in modular.compositions:
        if (
            len(set(row)) < len(row)
            or not all(0 <= module < modular.modules for module in row)
            or len(row) > longest
        ):
            allowed = f"has {row}, but takes modules 0 to {modular.modules - 1}, each once, at most {longest} (as the longest row)"
            raise ConfigError(
                "modular.compositions", modular.compositions, allowed, "name existing modules"
            )


def _learned(config: Config) -> None:
    modular = config.modular
    if (modular.per == "task") != (modular.labels is not None):
        allowed = "is the number of domains, needed for modular.per=task and for nothing else"
        raise ConfigError(
            "modular.labels",
            modular.labels,
            allowed,
            "set it, e.g. to 2, or use another modular.per",
        )
    looks_ahead = modular.per == "sequence" and modular.first != 1
    if looks_ahead and not config.moe.router.allow_future_leak:
        allowed = "routes a token by later ones of its sequence, which a causal model must not"
        fix = "use 1, or accept it with moe.router.allow_future_leak=true"
        raise ConfigError("modular.first", modular.first, allowed, fix)
    balance = config.moe.balance
    if balance.switch and balance.switch_level == "global":
        allowed = "is not known for modules with a learned router, whose counts of earlier accumulation steps are not kept"
        raise ConfigError(
            "moe.balance.switch_level", "global", allowed, "use micro_batch or sequence"
        )
    if balance.load and modular.routing != "noisy":
        allowed = f"needs the noisy router for the modules too, which have modular.routing={modular.routing}"
        raise ConfigError(
            "moe.balance.load", balance.load, allowed, "use modular.routing=noisy, or 0"
        )


def _aggregation(modular: ModularConfig) -> None:
    kind, learned = modular.aggregation, modular.routing in LEARNED
    if kind in WITHOUT_WEIGHTS and learned:
        allowed = f"does not read the weights of modular.routing={modular.routing}, whose router would learn nothing"
        raise ConfigError(
            "modular.aggregation",
            kind,
            allowed,
            "use weighted_sum, or a routing that is not learned",
        )
    if kind == "stacked" and not (
        modular.bank == "scale" or (modular.bank == "adapter" and modular.reads == "output")
    ):
        allowed = "lets each module read what the one before made, so it needs modules that read the frozen output"
        raise ConfigError("modular.aggregation", kind, allowed, "use modular.bank=adapter or scale")
    by_token = learned and modular.per == "token"
    if modular.bank in IN_FRONT and learned and modular.per != "task":
        allowed = f"reads the whole sequence for modular.bank={modular.bank}, which a causal model must not"
        raise ConfigError(
            "modular.per", modular.per, allowed, "use task, or a routing that is not learned"
        )
    if kind == "parameter_mean" and by_token:
        allowed = "takes the mean of the weights over a whole sequence, which a causal model must not for modular.per=token"
        raise ConfigError("modular.aggregation", kind, allowed, "use modular.per=sequence or task")


def _trained(config: Config) -> None:
    modular = config.modular
    if (
        modular.train == "router"
        and modular.routing not in LEARNED
        and modular.aggregation not in WITH_PARAMETERS
    ):
        allowed = f"trains nothing: modular.routing={modular.routing} and {modular.aggregation} have no parameters"
        raise ConfigError("modular.train", "router", allowed, "use a learned routing, or modules")
    if modular.train == "one_module":
        if modular.module is not None and not 0 <= modular.module < modular.modules:
            allowed = f"must be one of the modules 0 to {modular.modules - 1}"
            raise ConfigError(
                "modular.module", modular.module, allowed, f"use {modular.modules - 1}"
            )
        if config.parallel.mode == "fsdp":
            allowed = "does not work with modular.train=one_module: FSDP2 cuts modules into pieces"
            raise ConfigError("parallel.mode", "fsdp", allowed, "use ddp")
    if modular.aggregation == "parameter_mean" and config.parallel.mode == "fsdp":
        allowed = "does not work with modular.aggregation=parameter_mean, which reads parameters outside their module's forward"
        raise ConfigError("parallel.mode", "fsdp", allowed, "use ddp")
