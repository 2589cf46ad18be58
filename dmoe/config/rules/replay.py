"""Recorded choices of experts: what can be written, and trained with (`moe.replay`)."""

from __future__ import annotations

import os

from dmoe.config.errors import ConfigError
from dmoe.config.plugins import label
from dmoe.config.router_kinds import kinds_where, router_spec
from dmoe.config.rules.model import moe_blocks
from dmoe.config.schema import Config


def check_replay(config: Config) -> None:
    """Refuse to record or replay what has no choices, or choices whose weights nothing gives.

    Raises:
        ConfigError: the first reason found.
    """
    replay = config.moe.replay
    given = {"moe.replay.record": replay.record, "moe.replay.from": replay.from_}
    for field, value in given.items():
        if value is not None:
            _check_layers(config, field, value)
            _check_replayable(config, field, value)
    if config.tracking.trace != "none":
        _check_trace(config)
    if replay.from_ is None:
        return
    if replay.record and os.path.realpath(replay.record) == os.path.realpath(replay.from_):
        allowed = "is moe.replay.from too: the choices would be overwritten while they are read"
        raise ConfigError("moe.replay.record", replay.record, allowed, "name another directory")
    if config.moe.capacity.overflow == "next_choice":
        allowed = "offers a token's next expert, and recorded choices have none"
        raise ConfigError("moe.capacity.overflow", "next_choice", allowed, "use drop")


def _check_layers(config: Config, field: str, value: str) -> None:
    bank = config.modular.bank
    if not value:
        raise ConfigError(field, "''", "must not be empty", "leave it out")
    if bank != "none":
        allowed = f"knows the choices of MoE layers, not those of modular.bank={bank}"
        raise ConfigError(field, value, allowed, "leave it out")
    if config.model.source is None and not moe_blocks(config):
        raise ConfigError(field, value, "needs a model with MoE layers", "leave it out")


def _check_trace(config: Config) -> None:
    field, value, kind = "tracking.trace", config.tracking.trace, config.moe.router.kind
    if config.train.task != "language_modelling":
        allowed = f"has no meaning for train.task={config.train.task}"
        raise ConfigError(field, value, allowed, "leave it out")
    _check_layers(config, field, value)
    if value == "scores" and not router_spec(kind).ranks_experts:
        allowed = f"needs a router that ranks experts, and moe.router.kind={label(kind)} does not"
        raise ConfigError(field, value, allowed, "use counts or none")
    if not router_spec(kind).ordered_choices:
        allowed = f"writes the choices of a token, and moe.router.kind={label(kind)} makes none"
        raise ConfigError(field, value, allowed, "use none")


def _check_replayable(config: Config, field: str, value: str) -> None:
    kind = config.moe.router.kind
    if config.model.source is None and not router_spec(kind).replayable:
        kinds = ", ".join(kinds_where(replayable=True))
        allowed = f"needs a router that weighs given experts by their logits ({kinds})"
        fix = f"not moe.router.kind={label(kind)}"
        raise ConfigError(field, value, allowed, f"use one of them, {fix}")
