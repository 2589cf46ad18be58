"""Read a file of JSON lines that another process may be writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines that are whole; what follows the last line break is still being written.

    A `write` that crosses a page of the file becomes visible in two parts, however short it is: a
    test that watched a run read half a line, once in some hundred times.
    """
    whole, _, _incomplete = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]
