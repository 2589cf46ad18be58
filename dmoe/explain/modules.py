"""Modules on the network, in words."""

from __future__ import annotations

from dmoe.config.rules.modular import LEARNED, choices
from dmoe.config.schema import ModularConfig
from dmoe.explain.section import Section, count
from dmoe.explain.setting import Setting
from dmoe.train.modular.attach import place_pattern

TRAINED = {
    "joint": "Everything is trained.",
    "modules": "The core is frozen; modules, routers and aggregations are trained.",
    "one_module": "One module of every bank is trained; the core, the other modules, routers and aggregations are frozen.",
    "router": "Routers and aggregations are trained; the core and the modules are frozen.",
}


def describe(setting: Setting) -> Section | None:
    """None for a network without modules."""
    modular = setting.config.modular
    if modular.bank == "none":
        return None
    start = "the seed" if modular.core is None else modular.core
    words = [
        f"{count(modular.modules, 'module')} of kind {modular.bank} beside each of {place_pattern(modular)}, shared by "
        f"{count(setting.ep, 'rank')}.",
        _routing(modular),
        f"{TRAINED[modular.train]} The weights start from {start}.",
    ]
    numbers = {
        "bank": modular.bank,
        "modules": modular.modules,
        "choices": choices(modular),
        "train": modular.train,
    }
    return Section("modules", "Modules", words, numbers)


def _routing(modular: ModularConfig) -> str:
    joined = f"their outputs are joined by {modular.aggregation}."
    if modular.routing in LEARNED:
        return f"A learned router ({modular.routing}) sends each {modular.per} to {choices(modular)} of them; {joined}"
    by = (
        "with the same weights for all"
        if modular.routing == "constant"
        else "by the domain of its sequence"
    )
    return f"Each token goes to {choices(modular)} of them, {by}; {joined}"
