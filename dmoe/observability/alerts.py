"""What a person should look at, judged from a `train` line: said once, with what usually helps, and again only after it has cleared.

Something is wrong when it was beyond its limit on `patience` logged lines in a row, and right again when it has come back well inside,
by a tenth of the limit; in between nothing is said, so that a number that wanders around its limit does not fill the log.

Letters: E experts, K experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from dmoe.config.schema import AlertsConfig

BACK = 0.9
"""Cleared below this share of the limit."""
LEAST = 1.5
"""Experts there must be for each that a token chooses, for a collapse to mean anything."""
COLLAPSED = 0.75
"""Share of the way from perfect balance (1) to all tokens at the same K experts (E/K) that is a collapse at any number of experts."""


class Reading(NamedTuple):
    kind: str
    place: str
    """`layer 3`, or empty for the whole run."""
    value: float
    limit: float


ADVICE = {
    "load": (
        "expert collapse: the busiest expert takes {value:.1f} times the mean load",
        "raise moe.balance.switch or set moe.balance.bias=0.001, lower optim.lr, or add moe.balance.z against large logits",
    ),
    "dead_share": (
        "dead experts: {value:.0%} of the experts got no token",
        "raise moe.balance.switch or set moe.balance.bias=0.001; with few tokens a step, use a larger train.global_batch or fewer "
        "experts",
    ),
    "drop_rate": (
        "{value:.0%} of the choices are dropped",
        "raise moe.capacity.factor or moe.balance.switch, set moe.capacity.overflow=next_choice, or go dropless with "
        "moe.capacity.factor=null",
    ),
    "certainty": (
        "router saturation: a certainty of {value:.3f} (mean probability of the best expert, or 1 - entropy / ln E)",
        "raise moe.balance.z, lower optim.lr, or set moe.router.jitter=0.01",
    ),
    "straggler": (
        "the slowest rank takes {value:.1f} times the mean time",
        "look for other work or throttling on its machine; if the experts' load is uneven, that is the cause",
    ),
}


class Alerts:
    """Judges one line after another; the same on every rank that sees the same lines."""

    def __init__(self, config: AlertsConfig, top_k: int) -> None:
        self.config, self.top_k = config, top_k
        self.beyond: dict[tuple[str, str], int] = {}
        """Lines in a row beyond the limit, by kind and place; kept at `patience` until the number is well inside again."""

    def judge(self, values: dict[str, Any]) -> list[str]:
        """One text for each kind of trouble that is new with this `train` line."""
        fresh: dict[str, list[Reading]] = {}
        for reading in self._readings(values):
            if self._is_new(reading):
                fresh.setdefault(reading.kind, []).append(reading)
        return [_text(readings) for readings in fresh.values()]

    def _is_new(self, reading: Reading) -> bool:
        key = (reading.kind, reading.place)
        before = self.beyond.get(key, 0)
        if reading.value > reading.limit:
            self.beyond[key] = min(before + 1, self.config.patience)
            return before == self.config.patience - 1
        said = before == self.config.patience
        if not said or reading.value <= BACK * reading.limit:
            self.beyond[key] = 0
        return False

    def _readings(self, values: dict[str, Any]) -> Iterator[Reading]:
        """Every number that has a limit and is there: a fixed router has no probability, a line of an unlogged quantity no key."""
        for layer in values.get("layers", ()):
            experts, place = len(layer["load"]), f"layer {layer['layer']}"
            for kind, value, limit in (
                ("load", layer["load_max_over_mean"], self._load_limit(layer, experts)),
                ("dead_share", layer["dead_experts"] / experts, self.config.dead_share),
                ("drop_rate", layer["drop_rate"], self.config.drop_rate),
                ("certainty", _certainty(layer, experts), self.config.certainty),
            ):
                if value is not None and limit is not None and math.isfinite(value):
                    yield Reading(kind, place, value, limit)
        straggler = values.get("straggler")
        if straggler is not None and self.config.straggler is not None:
            yield Reading("straggler", "", straggler, self.config.straggler)

    def _load_limit(self, layer: dict[str, Any], experts: int) -> float | None:
        """Of the busiest expert over the mean. None where tokens choose so many experts that it cannot be far above."""
        served, kept = 1 - layer["drop_rate"], layer.get("effective_k", 0.0)
        chosen = kept / served if served > 0 and kept > 0 else self.top_k
        if self.config.load is None or experts < LEAST * chosen:
            return None
        return min(self.config.load, 1 + COLLAPSED * (experts / chosen - 1))


def _certainty(layer: dict[str, Any], experts: int) -> float | None:
    """The best expert's probability; or, if that says more, how far the entropy has fallen from ln E towards 0."""
    if "top1_probability" not in layer or experts < 2:
        return None
    return float(max(layer["top1_probability"], 1 - layer["router_entropy"] / math.log(experts)))


def _text(readings: list[Reading]) -> str:
    worst = max(readings, key=lambda reading: reading.value)
    words, advice = ADVICE[worst.kind]
    places = ", ".join(
        reading.place.removeprefix("layer ") for reading in readings if reading.place
    )
    where = f" in {'layers' if len(readings) > 1 else 'layer'} {places}" if places else ""
    most = " (at the worst)" if len(readings) > 1 else ""
    return f"{words.format(value=worst.value)}{most}{where}; what usually helps: {advice}"
