"""Ranges that the literature recommends, and the settings of a config outside them.

A value outside its range is no error, and may be the point of an experiment: `dmoe explain` only
remarks on it. Values that cannot work are refused by the schema's constraints and by `rules/`. The
table in docs/semantics.md is `as_table()`. Imports no torch.

Coefficients of auxiliary losses are in dmoe's units: a loss is 1 at perfect balance (the Switch
loss) and the losses are summed over the MoE layers, as in Switch, ST-MoE and DeepSeekMoE. A
coefficient that was published for a mean over L layers is divided by L, and one for a loss that is
K at balance (transformers' `load_balancing_loss_func`) is multiplied by K: Mixtral 0.02 x 2 / 32,
Qwen3 0.001 x 8 / 48, OLMoE 0.01 / 16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dmoe.config.router_kinds import router_spec
from dmoe.config.schema import Config, MoEConfig


def _always(moe: MoEConfig) -> bool:
    return True


def _takes_exactly_top_k(moe: MoEConfig) -> bool:
    """`moe.top_k` is the number of experts per token: no maximum, no mean, not all of them."""
    spec = router_spec(moe.router.kind)
    return spec.ranks_experts and not spec.variable_k


@dataclass(frozen=True)
class Recommended:
    """One row of the table."""

    field: str
    """Dotted name without `moe.`."""
    low: float
    high: float
    source: str
    applies: Callable[[MoEConfig], bool] = _always
    """True if a config reads the setting. null and 0 turn a mechanism off and have no range."""

    def value(self, moe: MoEConfig) -> float:
        """Return the value in this config, or 0 if it is off or not read."""
        value: object = moe
        for name in self.field.split("."):
            value = getattr(value, name)
        assert value is None or isinstance(value, int | float), self.field
        return value if value and self.applies(moe) else 0.0


RECOMMENDED = (
    Recommended(
        "top_k",
        1,
        8,
        "Switch 1, GShard and Mixtral 2, OLMoE 8",
        _takes_exactly_top_k,
    ),
    Recommended("capacity.factor", 1.0, 2.0, "Switch 1.0 to 1.25, GShard 2.0"),
    Recommended("capacity.eval_factor", 1.0, 2.0, "ST-MoE 2.0"),
    Recommended(
        "balance.switch",
        1e-4,
        0.1,
        "Switch 0.01, DeepSeekMoE 0.001; converted: Mixtral 0.00125, OLMoE 0.000625, Qwen3 0.00017",
    ),
    Recommended("balance.z", 5e-5, 1e-2, "ST-MoE 0.001; converted: OLMoE 0.0000625"),
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
        lambda moe: "top_p" in router_spec(moe.router.kind).reads,
    ),
    Recommended(
        "router.min_weight",
        0.05,
        0.2,
        "the project's source documents: 0.1",
        lambda moe: "min_weight" in router_spec(moe.router.kind).reads,
    ),
    Recommended("experts.shared", 1, 2, "DeepSeekMoE 2, DeepSeek-V3 1"),
)


@dataclass(frozen=True)
class Remark:
    """One setting outside its range."""

    field: str
    value: float
    range: Recommended

    def __str__(self) -> str:
        low, high, source = self.range.low, self.range.high, self.range.source
        side = "below" if self.value < low else "above"
        recommended = f"the recommended {low:g} to {high:g} ({source})"
        return f"{self.field}={self.value:g} is {side} {recommended}."


def out_of_range(config: Config) -> list[Remark]:
    """List the settings outside their ranges, in table order. For models with MoE layers only."""
    values = ((item, item.value(config.moe)) for item in RECOMMENDED)
    return [
        Remark(f"moe.{item.field}", value, item)
        for item, value in values
        if value and not item.low <= value <= item.high
    ]


def as_table() -> str:
    """Format the ranges as a Markdown table."""
    rows = [
        f"| `moe.{item.field}` | {item.low:g} to {item.high:g} | {item.source} |"
        for item in RECOMMENDED
    ]
    return "\n".join(["| field | recommended | source |", "|---|---|---|", *rows])
