"""Content of the trackers: named scalars of a metrics line, load per expert over a run.

wandb and TensorBoard both group names by the part before the first slash. So each MoE layer is a
group, `layer_03/drop_rate`, and the rest of a line is grouped by event: `train/loss`,
`eval/bits_per_byte`. Values of a layer in an evaluation are `layer_03/eval/stability`.

Letters: E experts, L MoE layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dmoe.runs.metrics_log import Line

NO_METRICS = ("event", "step", "time", "layer")
"""Keys of a line that are no metrics."""
LIST_ITEM = {
    "load_by_rank": "rank",
    "drop_rate_by_choice": "choice",
    "dropped_mass_by_choice": "choice",
}
"""Kind of the items of a list; the items of all other lists are experts."""
MAX_LIST_ITEMS = 64
"""Longest list or matrix sent as scalars. Heat maps and the report show longer ones."""
MAX_LISTED_SCALARS = 512
"""Most scalars from all lists of one line; with more, none of them is sent.

One costs 0.02 ms in TensorBoard, 0.01 ms in wandb.
"""
MAX_CELLS = 200_000
"""Cells of the heat maps of all layers together: about 1 MB of JSON."""
MIN_COLUMNS, MAX_COLUMNS = 24, 300
"""Limits of the steps in one heat map. Right after a thinning it has half of its maximum."""
EXTREMES = 3
"""Experts listed per layer with the highest load, and as many with the lowest."""


def scalars(values: dict[str, Any], event: str) -> dict[str, float]:
    """Return the finite numbers of one metrics line by tracker name. Null has no entry."""
    single: dict[str, float] = {}
    listed: dict[str, float] = {}
    for key, value in values.items():
        if key == "layers":
            for position, layer in enumerate(value):
                suffix = "" if event == "train" else f"/{event}"
                prefix = layer_name(layer.get("layer", position)) + suffix
                _collect(layer, prefix, single, listed)
        else:
            _collect({key: value}, event, single, listed)
    return single | listed if len(listed) <= MAX_LISTED_SCALARS else single


def layer_name(layer: int) -> str:
    """Return the group of a layer. Two digits, so that names sort like numbers."""
    return f"layer_{layer:02d}"


def _collect(
    values: dict[str, Any], prefix: str, single: dict[str, float], listed: dict[str, float]
) -> None:
    """Add the numbers of `values` to `single`, those in lists to `listed`."""
    for key, value in values.items():
        name = f"{prefix}/{key}"
        if key in NO_METRICS:
            continue
        if isinstance(value, dict):
            _collect(value, name, single, listed)
        elif isinstance(value, list):
            listed |= _list_items(key, name, value)
        elif _is_finite(value):
            single[name] = float(value)


def _list_items(key: str, name: str, items: list[Any]) -> dict[str, float]:
    """`load/expert_03`, `drop_rate_by_choice/choice_1` (a token's best), `traffic/0_to_1`."""
    if items and isinstance(items[0], list):
        # The other matrix, how often two experts are chosen together, is only in the report.
        if key != "traffic" or sum(map(len, items)) > MAX_LIST_ITEMS:
            return {}
        return {
            f"{name}/{i}_to_{j}": float(sent)
            for i, row in enumerate(items)
            for j, sent in enumerate(row)
        }
    if len(items) > MAX_LIST_ITEMS:
        return {}
    item = LIST_ITEM.get(key, "expert")
    first, digits = (1, 1) if item == "choice" else (0, 2)
    return {
        f"{name}/{item}_{index:0{digits}d}": float(value)
        for index, value in enumerate(items, first)
        if _is_finite(value)
    }


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


class Extreme(NamedTuple):
    """One of a layer's experts with the highest or lowest load at the last logged step.

    The field names are the columns of wandb's table.
    """

    layer: int
    place: str
    """`hottest 1`, `coldest 2` ..."""
    expert: int
    choices: float
    share: float
    """Load as a multiple of the mean load."""


class _Column(NamedTuple):
    step: int
    load: list[float]


@dataclass
class _LayerHistory:
    """Load of one layer.

    Each column is one logged step: the most uneven of `stride` consecutive ones.
    """

    max_columns: int
    stride: int = 1
    steps_in_last: int = 0
    columns: list[_Column] = field(default_factory=list)
    newest: _Column = field(default_factory=lambda: _Column(0, []))

    def add(self, step: int, load: list[float]) -> None:
        self.newest = _Column(step, load)
        if self.steps_in_last == self.stride or not self.columns:
            if len(self.columns) == self.max_columns:
                self._thin()
            self.columns.append(self.newest)
            self.steps_in_last = 1
        else:
            self.columns[-1] = _more_uneven(self.columns[-1], self.newest)
            self.steps_in_last += 1

    def with_newest(self) -> list[_Column]:
        """Return the columns; the newest step is always among them."""
        return self.columns if self.columns[-1] is self.newest else [*self.columns, self.newest]

    def _thin(self) -> None:
        """Merge pairs of columns."""
        pairs = zip(self.columns[::2], self.columns[1::2], strict=True)
        self.columns = [_more_uneven(*pair) for pair in pairs]
        self.stride *= 2


class LoadHistory:
    """Load per expert of a run's `train` lines, thinned. Costs E * L numbers per logged step."""

    def __init__(self, lines: Iterable[Line] = ()) -> None:
        """Add the `train` lines of `lines`, which are in the order of their steps."""
        self.layers: dict[int, _LayerHistory] = {}
        for line in lines:
            if line["event"] == "train":
                self.add(line["step"], line)

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Add the `layers` of one `train` line."""
        with_load = [layer for layer in values.get("layers", []) if layer.get("load")]
        loads = {layer.get("layer", i): layer["load"] for i, layer in enumerate(with_load)}
        if not self.layers and loads:
            columns = MAX_CELLS // sum(map(len, loads.values()))
            # Even, so that columns can be merged in pairs.
            columns = min(MAX_COLUMNS, max(MIN_COLUMNS, columns)) // 2 * 2
            self.layers = {index: _LayerHistory(columns) for index in loads}
        for index, load in loads.items():
            self.layers[index].add(step, load)

    def by_step(self) -> dict[int, tuple[list[int], list[list[float]]]]:
        """Return by layer: the steps, and per expert its relative loads at these steps."""
        found = {}
        for index, layer in self.layers.items():
            columns = layer.with_newest()
            rows = zip(*(relative_load(column.load) for column in columns), strict=True)
            found[index] = ([column.step for column in columns], [list(row) for row in rows])
        return found

    def last(self) -> tuple[list[int], list[list[float]]]:
        """Return the layers, and per layer the relative loads at the last logged step."""
        loads = [relative_load(layer.newest.load) for layer in self.layers.values()]
        return list(self.layers), loads

    def extremes(self) -> list[Extreme]:
        """Return per layer its hottest experts, hottest first, and its coldest, coldest last."""
        return [
            extreme
            for index, layer in self.layers.items()
            for extreme in _extremes(index, layer.newest.load)
        ]


def relative_load(load: Sequence[float]) -> list[float]:
    """Return the load per expert as multiples of the mean; zeros if the sum is 0."""
    mean = sum(load) / len(load)
    return [round(choices / mean, 4) if mean else 0.0 for choices in load]


def _more_uneven(one: _Column, other: _Column) -> _Column:
    return other if max(relative_load(other.load)) > max(relative_load(one.load)) else one


def _extremes(layer: int, load: list[float]) -> list[Extreme]:
    relative = relative_load(load)
    order = sorted(range(len(load)), key=lambda expert: (-load[expert], expert))
    count = min(EXTREMES, len(load) // 2)
    experts = {f"hottest {i + 1}": order[i] for i in range(count)}
    experts |= {f"coldest {i + 1}": order[-1 - i] for i in reversed(range(count))}
    return [
        Extreme(layer, place, expert, load[expert], relative[expert])
        for place, expert in experts.items()
    ]
