"""A metrics file that another process appends to: its whole lines, each once, as they come."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["Follower"]


class Follower:
    """Reads on from where it was.

    A last line without its end is not there yet: a writer may be in the middle of it, or was killed there, and then the next writer
    cuts it off. So what was read never has to be taken back, unless the file is another one, or shorter than what was read of it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.unreadable = path, 0
        """Lines that were no JSON object with an event and a step."""
        self._read, self._file = 0, (0, 0)

    def poll(self) -> tuple[list[dict[str, Any]], bool]:
        """The lines since the last call, and whether the file had to be begun again. Nothing as long as there is no file."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                again = self._read > 0 and ((status.st_dev, status.st_ino) != self._file or status.st_size < self._read)
                self._read, self._file = 0 if again else self._read, (status.st_dev, status.st_ino)
                file.seek(self._read)
                text = file.read()
        except (FileNotFoundError, NotADirectoryError):
            return [], False
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        lines = [_parsed(line) for line in whole.splitlines()]
        self.unreadable += lines.count(None)
        return [line for line in lines if line is not None], again


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    sound = isinstance(line, dict) and isinstance(line.get("event"), str) and type(line.get("step")) is int
    return line if sound else None
