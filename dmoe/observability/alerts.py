"""Routing alerts of a `train` line: expert collapse, dead experts, drops, saturation, stragglers.

An alert is raised once, when a value was over its limit on `patience` consecutive logged lines,
and again only after the value has fallen below 90% of the limit: a value close to its limit does
not fill the log. (A value at 90 to 100% changes nothing after an alert.)

Letters: E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from dmoe.config.schema import AlertsConfig

CLEARED_BELOW = 0.9
"""Fraction of the limit below which an alert is cleared."""
MIN_EXPERTS_PER_CHOICE = 1.5
"""Smallest E/K for which a collapse is defined."""
COLLAPSE_FRACTION = 0.75
"""Position between perfect balance (max/mean 1) and full collapse (max/mean E/K) for any E."""


class Measurement(NamedTuple):
    """One value with a limit."""

    kind: str
    place: str
    """`layer 3`, or empty for the whole run."""
    value: float
    limit: float


MESSAGES = {
    "load": (
        "expert collapse: the busiest expert takes {value:.1f} times the mean load",
        "raise moe.balance.switch or set moe.balance.bias=0.001, lower optim.lr, or add "
        "moe.balance.z against large logits",
    ),
    "dead_share": (
        "dead experts: {value:.0%} of the experts got no token",
        "raise moe.balance.switch or set moe.balance.bias=0.001; with few tokens per step, use a "
        "larger train.global_batch or fewer experts",
    ),
    "drop_rate": (
        "{value:.0%} of the choices are dropped",
        "raise moe.capacity.factor or moe.balance.switch, set moe.capacity.overflow=next_choice, "
        "or go dropless with moe.capacity.factor=null",
    ),
    "certainty": (
        "router saturation: a certainty of {value:.3f} (mean probability of the best expert, or "
        "1 - entropy / ln E)",
        "raise moe.balance.z, lower optim.lr, or set moe.router.jitter=0.01",
    ),
    "straggler": (
        "the slowest rank takes {value:.1f} times the mean time",
        "look for other work or throttling on its machine; if the experts' load is uneven, that "
        "is the cause",
    ),
}
"""Message and advice by kind."""


class Alerts:
    """Checks one line after another; deterministic, so equal on all ranks with the same lines."""

    def __init__(self, config: AlertsConfig, top_k: int) -> None:
        self.config, self.top_k = config, top_k
        self.lines_over_limit: dict[tuple[str, str], int] = {}
        """Consecutive lines over the limit by kind and place; `patience` after an alert."""

    def check(self, values: dict[str, Any]) -> list[str]:
        """Return one text per kind of alert that is new with this `train` line."""
        new: dict[str, list[Measurement]] = {}
        for measured in self._measurements(values):
            if self._is_new(measured):
                new.setdefault(measured.kind, []).append(measured)
        return [_alert_text(measurements) for measurements in new.values()]

    def _is_new(self, measured: Measurement) -> bool:
        key = (measured.kind, measured.place)
        before = self.lines_over_limit.get(key, 0)
        if measured.value > measured.limit:
            self.lines_over_limit[key] = min(before + 1, self.config.patience)
            return before == self.config.patience - 1
        alerted = before == self.config.patience
        if not alerted or measured.value <= CLEARED_BELOW * measured.limit:
            self.lines_over_limit[key] = 0
        return False

    def _measurements(self, values: dict[str, Any]) -> Iterator[Measurement]:
        """All values that exist and have a limit, e.g. no probability for a fixed router."""
        for layer in values.get("layers", ()):
            experts, place = len(layer["load"]), f"layer {layer['layer']}"
            for kind, value, limit in (
                ("load", layer["load_max_over_mean"], self._load_limit(layer, experts)),
                ("dead_share", layer["dead_experts"] / experts, self.config.dead_share),
                ("drop_rate", layer["drop_rate"], self.config.drop_rate),
                ("certainty", _certainty(layer, experts), self.config.certainty),
            ):
                if value is not None and limit is not None and math.isfinite(value):
                    yield Measurement(kind, place, value, limit)
        straggler = values.get("straggler")
        if straggler is not None and self.config.straggler is not None:
            yield Measurement("straggler", "", straggler, self.config.straggler)

    def _load_limit(self, layer: dict[str, Any], experts: int) -> float | None:
        """Limit of the load max/mean. None where K is so near E that max/mean cannot be large."""
        kept_fraction, kept = 1 - layer["drop_rate"], layer.get("effective_k", 0.0)
        chosen = kept / kept_fraction if kept_fraction > 0 and kept > 0 else self.top_k
        if self.config.load is None or experts < MIN_EXPERTS_PER_CHOICE * chosen:
            return None
        return min(self.config.load, 1 + COLLAPSE_FRACTION * (experts / chosen - 1))


def _certainty(layer: dict[str, Any], experts: int) -> float | None:
    """Larger of the best expert's mean probability and 1 - entropy / ln E; None if unknown."""
    if "top1_probability" not in layer or experts < 2:
        return None
    return float(max(layer["top1_probability"], 1 - layer["router_entropy"] / math.log(experts)))


def _alert_text(measurements: list[Measurement]) -> str:
    """One text for the alerts of one kind, with the worst value and all layers."""
    worst = max(measurements, key=lambda measured: measured.value)
    message, advice = MESSAGES[worst.kind]
    several = len(measurements) > 1
    layers = [measured.place.removeprefix("layer ") for measured in measurements if measured.place]
    where = f" in {'layers' if several else 'layer'} {', '.join(layers)}" if layers else ""
    worst_note = " (at the worst)" if several else ""
    text = message.format(value=worst.value)
    return f"{text}{worst_note}{where}; what usually helps: {advice}"
