"""The load of every expert over a run, small enough to keep and to draw again and again.

Letters: E experts, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

CELLS = 200_000
"""Of the heat-maps of all layers together: about 1 MB of JSON."""
COLUMNS = (24, 300)
"""Fewest and most steps of one heat-map; half of it right after they were thinned."""
EXTREMES = 3


class Extreme(NamedTuple):
    """One of a layer's hottest or coldest experts at the last logged step."""

    layer: int
    place: str
    expert: int
    choices: float
    share: float
    """As a multiple of the fair share."""


@dataclass
class _Columns:
    """One layer. Each column is a logged step: of a stretch of `stride` logged steps the least even one, as it was measured."""

    most: int
    stride: int = 1
    in_last: int = 0
    columns: list[tuple[int, list[float]]] = field(default_factory=list)
    newest: tuple[int, list[float]] = (0, [])

    def add(self, step: int, load: list[float]) -> None:
        self.newest = (step, load)
        if self.in_last == self.stride or not self.columns:
            if len(self.columns) == self.most:
                self._thin()
            self.columns.append(self.newest)
            self.in_last = 1
        else:
            self.columns[-1] = _less_even(self.columns[-1], self.newest)
            self.in_last += 1

    def drawn(self) -> list[tuple[int, list[float]]]:
        """The newest step is always among them."""
        return self.columns if self.columns[-1] is self.newest else [*self.columns, self.newest]

    def _thin(self) -> None:
        pairs = zip(self.columns[::2], self.columns[1::2], strict=True)
        self.columns = [_less_even(*pair) for pair in pairs]
        self.stride *= 2


class LoadHistory:
    """Loads of the `train` lines it was given, in the order of their steps. Cost: E * L numbers a logged step, nothing else."""

    def __init__(self, lines: Iterable[dict[str, Any]] = ()) -> None:
        self.layers: dict[int, _Columns] = {}
        for line in lines:
            if line["event"] == "train":
                self.add(line["step"], line)

    def add(self, step: int, values: dict[str, Any]) -> None:
        loads = {
            layer.get("layer", position): layer["load"]
            for position, layer in enumerate(_with_load(values))
        }
        if not self.layers and loads:
            low, high = COLUMNS
            most = min(high, max(low, CELLS // sum(map(len, loads.values())))) // 2 * 2
            self.layers = {index: _Columns(most) for index in loads}
        for index, load in loads.items():
            self.layers[index].add(step, load)

    def by_step(self) -> dict[int, tuple[list[int], list[list[float]]]]:
        """By layer: the steps, and for each expert its load at them, as multiples of the fair share."""
        found = {}
        for index, layer in self.layers.items():
            columns = layer.drawn()
            rows = zip(*(shares(load) for _, load in columns), strict=True)
            found[index] = ([step for step, _ in columns], [list(row) for row in rows])
        return found

    def last(self) -> tuple[list[int], list[list[float]]]:
        """The layers, and for each of them the load of its experts at the last logged step, as multiples of the fair share."""
        return list(self.layers), [shares(layer.newest[1]) for layer in self.layers.values()]

    def extremes(self) -> list[Extreme]:
        """Of each layer its hottest experts, hottest first, and its coldest, coldest last."""
        return [
            extreme
            for index, layer in self.layers.items()
            for extreme in _extremes(index, layer.newest[1])
        ]


def shares(load: Sequence[float]) -> list[float]:
    """Choices as multiples of the fair share, the mean over the experts; of no choices at all, zeros."""
    mean = sum(load) / len(load)
    return [round(choices / mean, 4) if mean else 0.0 for choices in load]


def _with_load(values: dict[str, Any]) -> list[dict[str, Any]]:
    return [layer for layer in values.get("layers", []) if layer.get("load")]


def _less_even(
    one: tuple[int, list[float]], other: tuple[int, list[float]]
) -> tuple[int, list[float]]:
    return other if max(shares(other[1])) > max(shares(one[1])) else one


def _extremes(layer: int, load: list[float]) -> list[Extreme]:
    share = shares(load)
    order = sorted(range(len(load)), key=lambda expert: (-load[expert], expert))
    count = min(EXTREMES, len(load) // 2)
    places = {f"hottest {place + 1}": order[place] for place in range(count)}
    places |= {f"coldest {place + 1}": order[-1 - place] for place in reversed(range(count))}
    return [
        Extreme(layer, place, expert, load[expert], share[expert])
        for place, expert in places.items()
    ]
