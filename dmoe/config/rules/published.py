"""A published model (`model.source`): which fields change it, and which come from it."""

from __future__ import annotations

from dataclasses import replace

from dmoe.config.errors import ConfigError
from dmoe.config.plugins import get
from dmoe.config.published import FIELD_NAMES, contradiction, quantization_of, read_shape
from dmoe.config.rules.layer import check_layer
from dmoe.config.schema import (
    Config,
    ExpertsConfig,
    LoraConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
)

SHAPE = {field.partition(".")[2] for field in FIELD_NAMES}


def check_published(config: Config) -> None:
    """Refuse settings that a published model does not have, or that contradict it.

    Raises:
        ConfigError: the first reason found.
    """
    source, moe = config.model.source, config.moe
    assert source is not None
    if config.train.task != "language_modelling":
        why = "is a language model"
        raise ConfigError("model.source", source, why, "use train.task=language_modelling")
    if config.modular.bank != "none":
        why = "attaches modules to dmoe's own model"
        raise ConfigError("modular.bank", config.modular.bank, why, "leave model.source out")
    if config.optim.kind == "muon":
        why = "knows the matrices of dmoe's own model only"
        raise ConfigError("optim.kind", "muon", why, "use adamw")
    if config.train.recompute in ("activation", "experts"):
        why = "is for the layers of dmoe's own model"
        raise ConfigError("train.recompute", config.train.recompute, why, "use block or none")
    if config.train.offload != "none":
        why = "moves what the blocks of dmoe's own model save"
        raise ConfigError("train.offload", config.train.offload, why, "use train.recompute=block")
    _check_defaults("model", config.model, ModelConfig(), {"source", "lora", *SHAPE})
    _check_defaults("moe.router", moe.router, RouterConfig(), {"freeze"})
    _check_defaults("moe.experts", moe.experts, ExpertsConfig(), set())
    check_published_moe(moe)
    _check_lora(config.model.lora)
    # the family's router decides about weights, not moe.router.renormalize
    router, balance = moe.router, replace(moe.balance, pooled=0.0)
    router = replace(router, renormalize=moe.top_k > 1)
    check_layer(replace(moe, router=router, balance=balance))
    quantization_of(source)
    for field, value in read_shape(source).fields.items():
        if get(config, field) != value:
            raise contradiction(field, get(config, field), value, source)


def refuse_lora(lora: LoraConfig) -> None:
    """Refuse LoRA of dmoe's own network. Raises ConfigError."""
    if lora != LoraConfig():
        why = "is for a published model; dmoe's own network has modules"
        fix = "set model.source, or use modular.bank=lora"
        raise ConfigError("model.lora.rank", lora.rank, why, fix)


def _check_lora(lora: LoraConfig) -> None:
    if not lora.rank and lora != LoraConfig():
        why = "trains the weights themselves, and nothing would read the rest of model.lora"
        raise ConfigError("model.lora.rank", 0, why, "set it, e.g. to 8")


def check_published_moe(moe: MoEConfig) -> None:
    """Refuse what needs dmoe's own router. Raises ConfigError."""
    if moe.exchange == "padded" and moe.capacity.factor is None:
        why = "sends a fixed number of slots and so needs moe.capacity.factor"
        raise ConfigError("moe.exchange", "padded", why, "set it, e.g. to 1.25")
    if moe.capacity.overflow != "drop":
        why = "needs a router that ranks its next choices; a published model's own does not"
        raise ConfigError("moe.capacity.overflow", moe.capacity.overflow, why, "use drop")
    if moe.capacity.renormalize:
        why = "would change weights that a published model's router does not scale to a fixed sum"
        raise ConfigError("moe.capacity.renormalize", True, why, "use false")
    if moe.balance.load:
        why = "needs the noisy router; a published model has its own"
        raise ConfigError("moe.balance.load", moe.balance.load, why, "use moe.balance.switch")


def _check_defaults(section: str, own: object, default: object, free: set[str]) -> None:
    for name, value in vars(default).items():
        if name not in free and getattr(own, name) != value:
            why = "is what the model of model.source has"
            raise ConfigError(f"{section}.{name}", getattr(own, name), why, "leave it out")
