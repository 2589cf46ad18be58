"""The bytes of operators that a plan counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dmoe.simulation.recording.kernel import MOVERS, SOURCES, describe

ROWS, WIDTH, TABLE = 10, 8, 1000
ID_BYTES, ROW_BYTES = 8, 4 * WIDTH


def call(name: str) -> tuple[Any, torch.Tensor]:
    """Return the arguments and the result of a call that touches 10 rows of a table of 1,000."""
    table, rows = torch.zeros(TABLE, WIDTH), torch.ones(ROWS, WIDTH)
    row_R = torch.arange(ROWS)
    each_RW = row_R.unsqueeze(1).expand(-1, WIDTH)
    calls: dict[str, tuple[Any, ...]] = {
        "gather": (table, 0, each_RW),
        "index_select": (table, 0, row_R),
        "index_copy_": (table, 0, row_R, rows),
        "embedding": (table, row_R),
        "scatter_": (table, 0, each_RW, rows),
        "scatter_add_": (table, 0, each_RW, rows),
    }
    return calls[name], getattr(torch.ops.aten, name)(*calls[name])


@pytest.mark.parametrize("name", MOVERS)
def test_what_moves_rows_is_counted_by_its_rows(name: str) -> None:
    """The write of each expert's rows was counted as one of all rows: 6.5 GB of a step of 10.5."""
    args, out = call(name)
    ids = ROWS * WIDTH if args[MOVERS[name]].ndim == 2 else ROWS
    assert describe(name, args, out).bytes == ids * ID_BYTES + 2 * ROWS * ROW_BYTES


def test_what_writes_in_place_names_what_it_writes() -> None:
    """Without the source, the whole table would be counted."""
    assert {name for name in MOVERS if name.endswith("_")} == set(SOURCES)
