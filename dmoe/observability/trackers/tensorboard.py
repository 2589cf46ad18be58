"""TensorBoard: one event file per start of a run. Heat maps of the load per expert.

A heat map is an image for TensorBoard, and a Plotly figure for wandb, whose page draws it with
axes and values. Neither needs matplotlib or a manual panel. The colour scale is fixed, so that
heat maps can be compared: dark blue is 0, white the mean load, red 4 times the mean and more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import tracking
from numpy.typing import NDArray

from dmoe.observability.trackers.content import Extreme, LoadHistory, layer_name
from dmoe.runs.directory import RunDir

if TYPE_CHECKING:
    import plotly.graph_objects

MAX_LOAD = 4.0
COLOUR_SCALE = ((0.0, (24, 55, 115)), (1.0, (247, 247, 247)), (MAX_LOAD, (178, 16, 30)))
"""Relative load, and its red, green and blue."""
MIN_HEIGHT, MIN_WIDTH = 256, 512
"""Approximate lower limits of an image in pixels: cells are enlarged to reach them."""


class TensorBoardTracker(tracking.TensorBoardTracker):  # type: ignore[misc]  # no types
    """accelerate's tracker with alerts and heat maps."""

    @classmethod
    def open(cls, run: RunDir, first_step: int) -> TensorBoardTracker:
        """Open a new event file; it makes steps after `first_step` in older files void."""
        purge = first_step + 1 if any((run.logs / "tensorboard").glob("events.*")) else None
        tracker = cls(run_name="tensorboard", logging_dir=run.logs, purge_step=purge)
        tracker.start()
        return tracker

    def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
        """Write all numbers of a step in one record.

        Five times as fast as accelerate, which writes one record per number.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary

        items = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self.writer.file_writer.add_summary(Summary(value=items), step)
        self.writer.flush()

    def alert(self, title: str, text: str, step: int) -> None:
        """Write a text."""
        self.writer.add_text(f"alert/{title}", text, step)
        self.writer.flush()

    def log_figures(self, history: LoadHistory, step: int) -> None:
        """Write heat maps, with the first expert or layer on top, and a table."""
        for layer, (_, rows) in history.by_step().items():
            self._add_image(f"{layer_name(layer)}/load_expert_by_step", rows, step)
        _, rows = history.last()
        self._add_image("experts/load_layer_by_expert", rows, step)
        table = _markdown_table(history.extremes())
        self.writer.add_text("experts/hottest_and_coldest", table, step)
        self.writer.flush()

    def _add_image(self, name: str, rows: list[list[float]], step: int) -> None:
        self.writer.add_image(name, heat_map_image(rows), step, dataformats="HWC")


def _markdown_table(extremes: list[Extreme]) -> str:
    head = "| layer | place | expert | choices | times the mean load |\n|---|---|---|---|---|"
    rows = [
        f"| {e.layer} | {e.place} | {e.expert} | {e.choices:g} | {e.share:g} |" for e in extremes
    ]
    return "\n".join([head, *rows])


def heat_map_image(rows: Sequence[Sequence[float]]) -> NDArray[np.uint8]:
    """Return a [height, width, 3] RGB image: one cell per number, the first row on top.

    Shorter rows are filled with black.
    """
    width = max(map(len, rows))
    padded = [[*row, *[np.nan] * (width - len(row))] for row in rows]
    table = np.array(padded, dtype=np.float64)
    points, known = [load for load, _ in COLOUR_SCALE], ~np.isnan(table)
    channels = [
        np.interp(table, points, [colour[channel] for _, colour in COLOUR_SCALE])
        for channel in range(3)
    ]
    visible = [np.where(known, channel, 0.0) for channel in channels]
    image = np.stack(visible, axis=-1).round().astype(np.uint8)
    cell_height, cell_width = max(1, MIN_HEIGHT // len(rows)), max(1, MIN_WIDTH // width)
    return image.repeat(cell_height, axis=0).repeat(cell_width, axis=1)


def heat_map_figure(
    rows: Sequence[Sequence[float]], x: tuple[str, Sequence[int]], y: tuple[str, Sequence[int]]
) -> plotly.graph_objects.Figure:
    """Return a Plotly heat map: one cell per number, the first row on top.

    `x` and `y` are the name and the values of each axis.
    """
    # Imported only for wandb: takes 0.1 s.
    import plotly.graph_objects as graph

    x_name, x_values = x
    y_name, y_values = y
    cells = {
        "type": "heatmap",
        "z": [list(row) for row in rows],
        "x": list(x_values),
        "y": list(y_values),
        "zmin": 0.0,
        "zmax": MAX_LOAD,
        "colorscale": [[load / MAX_LOAD, f"rgb{colour}"] for load, colour in COLOUR_SCALE],
        "colorbar": {"title": {"text": "times the mean load"}},
        "hovertemplate": f"{x_name} %{{x}}<br>{y_name} %{{y}}<br>"
        "%{z} times the mean load<extra></extra>",
    }
    layout = {
        "template": "none",
        "xaxis": {"title": {"text": x_name}},
        "yaxis": {"title": {"text": y_name}, "autorange": "reversed"},
    }
    return graph.Figure({"data": [cells], "layout": layout})
