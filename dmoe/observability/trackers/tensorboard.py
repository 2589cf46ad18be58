"""TensorBoard: an event file for each start of a run, in the run's directory.

Loads as colours: an image for TensorBoard, and for wandb a Plotly figure, which its page draws with axes and values under the mouse.

Neither needs matplotlib, or a panel made by hand. The scale is the same in every picture, so that two of them can be compared: white
is the fair share, dark blue is nothing, red is four times the fair share and more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.tracking import TensorBoardTracker
from numpy.typing import NDArray

from dmoe.observability.trackers.load_history import Extreme, LoadHistory
from dmoe.observability.trackers.names import layer_name
from dmoe.runs.directory import RunDir


class TensorBoardRun(TensorBoardTracker):  # type: ignore[misc]  # accelerate has no types
    @classmethod
    def open(cls, run: RunDir, first_step: int) -> TensorBoardRun:
        """A new event file, which says that steps after `first_step` in older files are void."""
        purge = first_step + 1 if any((run.logs / "tensorboard").glob("events.*")) else None
        board = cls(run_name="tensorboard", logging_dir=run.logs, purge_step=purge)
        board.start()
        return board

    def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
        """All numbers of a step in one record: five times as fast as accelerate's, which writes one for each."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        items = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self.writer.file_writer.add_summary(Summary(value=items), step)
        self.writer.flush()

    def alert(self, title: str, text: str, step: int) -> None:
        self.writer.add_text(f"alert/{title}", text, step)
        self.writer.flush()

    def draw(self, loads: LoadHistory, step: int) -> None:
        """Heat-maps, the first expert or layer on top, and a table. `heatmap.py` says what the colours mean."""
        for layer, (_, rows) in loads.by_step().items():
            self._image(f"{layer_name(layer)}/load_expert_by_step", rows, step)
        _, rows = loads.last()
        self._image("experts/load_layer_by_expert", rows, step)
        self.writer.add_text("experts/hottest_and_coldest", _markdown(loads.extremes()), step)
        self.writer.flush()

    def _image(self, name: str, rows: list[list[float]], step: int) -> None:
        self.writer.add_image(name, colours(rows), step, dataformats="HWC")


def _markdown(extremes: list[Extreme]) -> str:
    head = "| layer | place | expert | choices | times the fair share |\n|---|---|---|---|---|"
    return "\n".join(
        [
            head,
            *(
                f"| {e.layer} | {e.place} | {e.expert} | {e.choices:g} | {e.share:g} |"
                for e in extremes
            ),
        ]
    )


if TYPE_CHECKING:
    import plotly.graph_objects


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
    channels = [
        np.interp(table, points, [colour[channel] for _, colour in SCALE]) for channel in range(3)
    ]
    image = (
        np.stack([np.where(known, channel, 0.0) for channel in channels], axis=-1)
        .round()
        .astype(np.uint8)
    )
    return image.repeat(max(1, HEIGHT // len(rows)), axis=0).repeat(max(1, WIDTH // width), axis=1)


def figure(
    rows: Sequence[Sequence[float]],
    across: Sequence[int],
    along: str,
    down: Sequence[int],
    side: str,
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
