"""TensorBoard: an event file for each start of a run, in the run's directory."""

from __future__ import annotations

from typing import Any

from accelerate.tracking import TensorBoardTracker

from dmoe.training.run_dir import RunDir
from dmoe.training.trackers.heatmap import colours
from dmoe.training.trackers.loads import Extreme, LoadHistory
from dmoe.training.trackers.names import layer_name

__all__ = ["TensorBoardRun"]


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
    return "\n".join([head, *(f"| {e.layer} | {e.place} | {e.expert} | {e.choices:g} | {e.share:g} |" for e in extremes)])
