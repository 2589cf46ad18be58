"""Reader of a `metrics.jsonl` that another process appends to."""

from __future__ import annotations

import os
from pathlib import Path

from dmoe.runs.layer_file import LayerReader, layer_path
from dmoe.runs.metrics_log import Line, parse_line, read_layers


class MetricsFollower:
    """Incremental reader of a metrics file that another process appends to.

    Returns only complete lines: the writer may be in the middle of the last one, or was killed
    there, and then the next writer removes it. So no line ever has to be taken back, unless the
    file is replaced, or is shorter than what was read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unreadable = 0
        """Number of lines that were not valid, or whose layers could not be read."""
        self._offset = 0
        self._file_id = (0, 0)

    def poll(self) -> tuple[list[Line], bool]:
        """Return the lines since the last call, and True if the file was replaced and read again.

        Returns no lines as long as there is no file.
        """
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                file_id = (status.st_dev, status.st_ino)
                replaced = self._offset > 0 and (
                    file_id != self._file_id or status.st_size < self._offset
                )
                self._offset, self._file_id = 0 if replaced else self._offset, file_id
                file.seek(self._offset)
                text = file.read()
        except (FileNotFoundError, NotADirectoryError):
            return [], False
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        parsed = [parse_line(line) for line in complete.splitlines()]
        lines = [line for line in parsed if line is not None]
        with LayerReader(layer_path(self.path)) as reader:
            without = sum(not read_layers(line, reader) for line in lines)
        self.unreadable += parsed.count(None) + without
        return lines, replaced
