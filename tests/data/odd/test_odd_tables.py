"""Tables whose numbers are no features as they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.data.tables import TableSplits, fill_table_shape, open_table
from dmoe.data.tables.samples import standardized


def open_file(path: Path, *more: str) -> TableSplits:
    overrides = ["train.task=classification", f"data.source={path}", "data.label_field=kind"]
    config = fill_table_shape(load(None, [*overrides, "data.holdout=0.2", *more]))
    return open_table(config.data, seed=0)


def write_rows(path: Path, values: Sequence[object]) -> Path:
    rows = [{"a": value, "b": n, "kind": "xy"[n % 2]} for n, value in enumerate(values)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_constant_column_is_zero(tmp_path: Path) -> None:
    """1000 times 0.1 has a computed deviation of 1e-17, and the column became 1; a held-out value
    of 0.2 would have become 10^16."""
    table = open_file(write_rows(tmp_path / "t.jsonl", [0.1] * 1000))
    assert not table.train.samples(0, 100)[0][:, 0].any()
    held_out = standardized(np.full((1000, 1), 0.1), np.array([[0.2]]), ["a"])[1]
    assert held_out.item() == pytest.approx(0.1)


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_numbers_whose_deviation_is_no_float_are_refused(tmp_path: Path, scale: float) -> None:
    """Their squares overflow (or vanish), so the column became 0 and was not learnt from."""
    path = write_rows(tmp_path / "t.jsonl", [n * scale for n in range(60)])
    with pytest.raises(ConfigError, match=r"data\.columns=a: cannot be standardized"):
        open_file(path)


def test_what_float_refuses_is_named_with_its_row(tmp_path: Path) -> None:
    """An integer beyond float64 and a column of dates ended in a traceback."""
    path = write_rows(tmp_path / "t.jsonl", [*range(7), 10**400, *range(8, 60)])
    with pytest.raises(ConfigError, match=r"line 8 has 10+\.\.\., which is no number, in 'a'"):
        open_file(path)
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    days = [date(2020, 1, 1 + n % 28) for n in range(60)]
    table = pyarrow.table({"a": days, "kind": ["xy"[n % 2] for n in range(60)]})
    parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match="row 1 has 2020-01-01, which is no number, in 'a'"):
        open_file(tmp_path / "t.parquet", "data.columns=[a]")
