"""The ranges that the literature recommends, and which settings of a config lie outside of theirs. Imports no torch.

A value outside is no mistake (it may be what an experiment is about), so nothing here refuses: `dmoe explain` remarks on it. What
cannot work is in `check/`. The table in docs/semantics.md is `as_table()`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dmoe.config.schema import Config, MoEConfig

ONE_BY_ONE = ("top_k", "noisy", "group_limited")
"""Routers for which moe.top_k is what a token takes: no upper bound, no mean, not all of them."""


def _always(moe: MoEConfig) -> bool:
    return True


@dataclass(frozen=True)
class Recommended:
    field: str
    """Below `moe.`"""
    low: float
    high: float
    source: str
    read: Callable[[MoEConfig], bool] = _always
    """Whether the setting means anything in a config; besides, null and 0 turn a mechanism off, which is no value of it."""

    def value(self, moe: MoEConfig) -> float:
        """0 where it is off or not read."""
        found: object = moe
        for name in self.field.split("."):
            found = getattr(found, name)
        assert found is None or isinstance(found, int | float), self.field
        return found if found and self.read(moe) else 0.0


RECOMMENDED = (
    Recommended(
        "top_k",
        1,
        8,
        "Switch 1, GShard and Mixtral 2, OLMoE 8",
        lambda moe: moe.router.kind in ONE_BY_ONE,
    ),
    Recommended("capacity.factor", 1.0, 2.0, "Switch 1.0 to 1.25, GShard 2.0"),
    Recommended("capacity.eval_factor", 1.0, 2.0, "ST-MoE 2.0"),
    Recommended("balance.switch", 0.001, 0.1, "Switch 0.01, Qwen3 and DeepSeekMoE 0.001"),
    Recommended("balance.z", 1e-4, 1e-2, "ST-MoE 0.001"),
    Recommended("balance.importance", 0.01, 0.1, "Shazeer 2017: 0.1, for translation 0.01"),
    Recommended("balance.load", 0.01, 0.1, "Shazeer 2017: 0.1, for translation 0.01"),
    Recommended("balance.usage_std", 0.01, 0.1, "the project's source documents"),
    Recommended("balance.bias", 1e-4, 1e-2, "Wang 2024 and DeepSeek-V3 0.001"),
    Recommended("router.jitter", 0.01, 0.1, "Switch 0.01"),
    Recommended(
        "router.top_p",
        0.4,
        0.8,
        "Huang 2024: 0.4; the upper end is this project's",
        lambda moe: moe.router.kind == "adaptive",
    ),
    Recommended(
        "router.min_weight",
        0.05,
        0.2,
        "the project's source documents: 0.1",
        lambda moe: moe.router.kind == "budget",
    ),
    Recommended("experts.shared", 1, 2, "DeepSeekMoE 2, DeepSeek-V3 1"),
)


@dataclass(frozen=True)
class Remark:
    """One setting outside of its range."""

    field: str
    value: float
    range: Recommended

    def __str__(self) -> str:
        side = "below" if self.value < self.range.low else "above"
        return f"{self.field}={self.value:g} is {side} the recommended {self.range.low:g} to {self.range.high:g} ({self.range.source})."


def outside(config: Config) -> list[Remark]:
    """The settings in use that lie outside of their ranges, in the order of the table. Ask only for a model with mixture layers."""
    found = ((item, item.value(config.moe)) for item in RECOMMENDED)
    return [
        Remark(f"moe.{item.field}", value, item)
        for item, value in found
        if value and not item.low <= value <= item.high
    ]


def as_table() -> str:
    """The ranges in Markdown."""
    rows = [
        f"| `moe.{item.field}` | {item.low:g} to {item.high:g} | {item.source} |"
        for item in RECOMMENDED
    ]
    return "\n".join(["| field | recommended | source |", "|---|---|---|", *rows])
