"""Loads as colours: an image for TensorBoard, and for wandb a Plotly figure, which its page draws with axes and values under the mouse.

Neither needs matplotlib, or a panel made by hand. The scale is the same in every picture, so that two of them can be compared: white
is the fair share, dark blue is nothing, red is four times the fair share and more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import plotly.graph_objects

__all__ = ["SCALE", "colours", "figure"]

MOST_SHARE = 4.0
SCALE = ((0.0, (24, 55, 115)), (1.0, (247, 247, 247)), (MOST_SHARE, (178, 16, 30)))
"""A share of the load, and its red, green and blue."""
HEIGHT, WIDTH = 256, 512
"""Pixels an image has at least, about: cells are enlarged to that."""


def colours(rows: Sequence[Sequence[float]]) -> NDArray[np.uint8]:
    """[height, width, 3]: one cell a number, the first row on top. Rows of different length end in black."""
    width = max(map(len, rows))
    table = np.array([[*row, *[np.nan] * (width - len(row))] for row in rows], dtype=np.float64)
    points, known = [share for share, _ in SCALE], ~np.isnan(table)
    channels = [np.interp(table, points, [colour[channel] for _, colour in SCALE]) for channel in range(3)]
    image = np.stack([np.where(known, channel, 0.0) for channel in channels], axis=-1).round().astype(np.uint8)
    return image.repeat(max(1, HEIGHT // len(rows)), axis=0).repeat(max(1, WIDTH // width), axis=1)


def figure(
    rows: Sequence[Sequence[float]], across: Sequence[int], along: str, down: Sequence[int], side: str
) -> plotly.graph_objects.Figure:
    """One cell a number; the columns are `along` numbers `across`, the rows `side` numbers `down`, the first on top."""
    import plotly.graph_objects as graph  # 0.1 s, and only where wandb is used

    cells = {
        "type": "heatmap",
        "z": [list(row) for row in rows],
        "x": list(across),
        "y": list(down),
        "zmin": 0.0,
        "zmax": MOST_SHARE,
        "colorscale": [[share / MOST_SHARE, f"rgb{colour}"] for share, colour in SCALE],
        "colorbar": {"title": {"text": "times the fair share"}},
        "hovertemplate": f"{along} %{{x}}<br>{side} %{{y}}<br>%{{z}} times the fair share<extra></extra>",
    }
    layout = {
        "template": "none",
        "xaxis": {"title": {"text": along}},
        "yaxis": {"title": {"text": side}, "autorange": "reversed"},
    }
    return graph.Figure({"data": [cells], "layout": layout})
