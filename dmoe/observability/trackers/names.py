"""What the numbers of a metrics line are called in a tracker.

wandb and TensorBoard both make a section of the part before a name's first slash. So each MoE layer has a section of its own,
`layer_03/drop_rate`, and the rest of a line stands under its event, `train/loss`, `eval/bits_per_byte`; what an evaluation says of a
layer is `layer_03/eval/stability`.
"""

from __future__ import annotations

import math
from typing import Any

NOT_MEASURED = ("event", "step", "time", "layer")
ITEM = {"load_by_rank": "rank", "drop_rate_by_choice": "choice", "dropped_mass_by_choice": "choice"}
"""What the items of a list are; of all others they are experts."""
MOST_ITEMS = 64
"""Numbers in a list, or in a matrix. A person compares no more curves than that; heat-maps and the report show the longer ones."""
MOST_LISTED = 512
"""Numbers in all lists of one line: beyond, none of them is sent. One costs 0.02 ms in TensorBoard, 0.01 ms in wandb."""


def scalars(values: dict[str, Any], event: str) -> dict[str, float]:
    """The finite numbers of one line of metrics.jsonl, by name. What is null there has no name here."""
    single: dict[str, float] = {}
    listed: dict[str, float] = {}
    for key, value in values.items():
        if key == "layers":
            for position, layer in enumerate(value):
                prefix = layer_name(layer.get("layer", position)) + (
                    "" if event == "train" else f"/{event}"
                )
                _collect(layer, prefix, single, listed)
        else:
            _collect({key: value}, event, single, listed)
    return single | listed if len(listed) <= MOST_LISTED else single


def layer_name(layer: int) -> str:
    """Two digits, so that names sort as numbers do."""
    return f"layer_{layer:02d}"


def _collect(
    values: dict[str, Any], prefix: str, single: dict[str, float], listed: dict[str, float]
) -> None:
    for key, value in values.items():
        name = f"{prefix}/{key}"
        if key in NOT_MEASURED:
            continue
        if isinstance(value, dict):
            _collect(value, name, single, listed)
        elif isinstance(value, list):
            listed |= _items(key, name, value)
        elif _is_finite(value):
            single[name] = float(value)


def _items(key: str, name: str, items: list[Any]) -> dict[str, float]:
    """`load/expert_03`, `drop_rate_by_choice/choice_1` (a token's best), `traffic/0_to_1`."""
    if items and isinstance(items[0], list):
        if (
            key != "traffic" or sum(map(len, items)) > MOST_ITEMS
        ):  # how often two experts are chosen together is a picture
            return {}
        return {
            f"{name}/{i}_to_{j}": float(sent)
            for i, row in enumerate(items)
            for j, sent in enumerate(row)
        }
    if len(items) > MOST_ITEMS:
        return {}
    item = ITEM.get(key, "expert")
    first, width = (1, 1) if item == "choice" else (0, 2)
    return {
        f"{name}/{item}_{index:0{width}d}": float(value)
        for index, value in enumerate(items, first)
        if _is_finite(value)
    }


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
