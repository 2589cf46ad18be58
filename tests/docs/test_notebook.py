"""The notebook in `examples/` is run: its code cells in order, in one namespace."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "first_steps.ipynb"


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return found


@pytest.mark.slow
def test_every_cell_runs() -> None:
    """The last experiment shows what its text says: a larger coefficient, a more even load."""
    printed, names = io.StringIO(), dict[str, Any]()
    with contextlib.redirect_stdout(printed):
        for number, cell in enumerate(cells()):
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert "32 of 512 assignments dropped" in printed.getvalue()
    loads = [float(load) for load in re.findall(r"load max/mean ([\d.]+)", printed.getvalue())]
    assert len(loads) == 3
    assert loads[0] > loads[2] >= 1


def test_it_is_stored_without_output() -> None:
    """What it printed on one machine is no part of it, so it cannot grow old."""
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
