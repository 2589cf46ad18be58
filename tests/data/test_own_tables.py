"""A table of the user's own: columns, classes, splits; what cannot work is one sentence."""

from __future__ import annotations

import csv
import json
import random
import statistics
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dmoe
from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.config.rules import check
from dmoe.config.schema import Config
from dmoe.data.splits import holdout_hash
from dmoe.data.tables import TableSplits, fill_table_shape, open_table
from tests.tiny import SMALL

Row = list[Any]


def rows_of(count: int, seed: int = 0) -> list[Row]:
    """Points around three centres, a constant column, and the class."""
    draw = random.Random(seed)
    return [
        [round(draw.gauss(4 * k, 1), 3), round(draw.gauss(-4 * k, 1), 3), 5, ("c", "a", "b")[k]]
        for n in range(count)
        for k in [n % 3]
    ]


def write_csv(path: Path, rows: list[Row], header: str = "x,y,one,kind") -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        writer.writerows(rows)
    return path


def configured(path: Path | str, *overrides: str) -> Config:
    given = ["train.task=classification", f"data.source={path}", "data.label_field=kind"]
    config = fill_table_shape(load(None, [*given, *overrides]))
    check(config)
    return config


def opened(path: Path | str, *overrides: str) -> TableSplits:
    return open_table(configured(path, *overrides).data, 0)


def all_samples(split: object) -> tuple[np.ndarray, np.ndarray]:
    return split.samples(0, split.num_sequences)  # type: ignore[attr-defined,no-any-return]


def test_columns_are_standardized_and_classes_sorted(tmp_path: Path) -> None:
    rows = rows_of(120)
    path = write_csv(tmp_path / "my.csv", [*rows, rows[0]])
    config = configured(path, "data.holdout=0.3")
    assert config.data.columns == ["x", "y", "one"]
    assert config.data.classes == ["a", "b", "c"]
    found = open_table(config.data, 0)
    assert found.widths == {"features": 3}
    assert found.domains == ("a", "b", "c")
    assert found.describe().startswith(f"{path}: features (3), 3 classes; ")
    assert "1 exact duplicates removed" in found.describe()
    # The naive way: the hash of the three numbers splits, and each column is standardized in turn.
    held = [holdout_hash(struct.pack("<3d", *row[:3])) < 0.3 for row in rows]
    train = [row for row, is_held in zip(rows, held, strict=True) if not is_held]
    means = [statistics.fmean(row[w] for row in train) for w in range(3)]
    deviations = [statistics.pstdev([row[w] for row in train]) or 1 for w in range(3)]
    for split, is_held in ((found.train, False), (found.held_out, True)):
        value_NW, class_N = all_samples(split)
        ours = [row for row, side in zip(rows, held, strict=True) if side == is_held]
        expected = [[(row[w] - means[w]) / deviations[w] for w in range(3)] for row in ours]
        assert np.allclose(value_NW, np.array(expected), atol=1e-5)
        assert ["abc"[label] for label in class_N] == [row[3] for row in ours]
        assert (value_NW[:, 2] == 0).all(), "a column with one value gave NaN"


def test_formats_and_chosen_columns_give_the_same_table(tmp_path: Path) -> None:
    rows = rows_of(60)
    path = write_csv(tmp_path / "my.csv", rows)
    columns = dict(zip(("x", "y", "one", "kind"), map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table(columns), tmp_path / "my.parquet")
    (tmp_path / "my.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in pa.table(columns).to_pylist())
    )
    prints = {
        opened(tmp_path / name, "data.holdout=0.3").fingerprint
        for name in ("my.csv", "my.parquet", "my.jsonl")
    }
    assert len(prints) == 1
    chosen = opened(path, "data.columns=[y,x]", "data.classes=[c,b,a]", "data.holdout=0.3")
    assert chosen.domains == ("c", "b", "a")
    assert chosen.widths == {"features": 2}
    value_NW, class_N = all_samples(chosen.train)
    y_of = {name: value_NW[class_N == label, 0].mean() for label, name in enumerate("cba")}
    assert y_of["c"] > y_of["a"] > y_of["b"], "the first column is y: 0, -4 and -8"


def test_labels_that_are_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    rows: list[Row] = [[n, n % 11] for n in range(60)]
    assert configured(write_csv(tmp_path / "n.csv", rows, "x,kind")).data.classes == [
        str(n) for n in range(11)
    ]


def test_a_validation_file_is_the_held_out_split(tmp_path: Path) -> None:
    rows = rows_of(60)
    path = write_csv(tmp_path / "my.csv", rows)
    validation = write_csv(tmp_path / "val.csv", [*rows_of(30, seed=1), *rows[:5]])
    found = opened(path, f"data.validation_source={validation}")
    assert found.held_out.num_sequences == 35
    assert found.train.num_sequences == 55
    assert "samples of data.validation_source left out of training (5)" in found.describe()
    write_csv(validation, [[1, 2, 3, "d"]])
    with pytest.raises(
        ConfigError,
        match=r"data\.validation_source=.*val\.csv: line 2 has the label d, and data\.classes has",
    ):
        opened(path, f"data.validation_source={validation}")
    write_csv(validation, [[1, 2, "a"]], "x,z,kind")
    with pytest.raises(ConfigError, match=r"data\.columns=y: is no column of .*val\.csv; use one"):
        opened(path, f"data.validation_source={validation}")


BAD: dict[str, tuple[str, list[str], str]] = {
    "a missing value": ("x,kind\n1,a\n,b\n", [], "line 3 has no value in 'x'"),
    "no number": (
        "x,kind\n" + "1,a\n2,b\n" * 60 + "z,a\n",
        [],
        "line 122 has 'z', which is no number, in 'x'",
    ),
    "infinite": ("x,kind\n1,a\ninf,b\n", [], "line 3 has inf, which is no number"),
    "no label": ("x,kind\n1,a\n2,\n", [], "line 3 has no label in 'kind'"),
    "one class": ("x,kind\n1,a\n2,a\n", [], "data.label_field=kind: has only the class a in"),
    "no row": ("x,kind\n", [], "data.columns"),
    "strings": (
        "x,t,kind\n1,u,a\n2,v,b\n",
        [],
        "and t of .* is not .line 2 has 'u'.; use data.columns=.x., or",
    ),
    "text only": ("text,kind\nu,a\nv,b\n", [], "text is no feature of a classifier"),
    "other label": ("x,kind\n1,a\n2,b\n", ["data.label_field=k"], "k: is no column of .*one of x,"),
    "label null": ("x,kind\n1,a\n", ["data.label_field=null"], "null: must name the column with"),
    "other column": ("x,kind\n1,a\n2,b\n", ["data.columns=[z]"], "columns=z: is no column of"),
    "the label": ("x,kind\n1,a\n2,b\n", ["data.columns=[kind]"], "columns=kind: is no column of"),
    "an own class": ("x,kind\n1,a\n2,b\n", ["data.classes=[a,c]"], "line 3 has the label b, and"),
    "a column twice": (
        "x,kind\n1,a\n2,b\n",
        ["data.columns=[x,x]"],
        "data.columns=.* holds x twice",
    ),
    "one own class": ("x,kind\n1,a\n2,b\n", ["data.classes=[a]"], "must be two or more"),
    "streams": ("x,kind\n1,a\n2,b\n", ["data.streams=[y]"], "data.streams.* has features; name"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_a_table_is_one_sentence(case: str, tmp_path: Path) -> None:
    content, overrides, message = BAD[case]
    path = tmp_path / "my.csv"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as refused:
        opened(path, *overrides)
    assert "\n" not in str(refused.value)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("text")
    for source, message in {
        text: "must be a table for train.task=classification, and is a plain text",
        tmp_path: "and is a directory",
        tmp_path / "no.csv": "and there is no such file; check the path",
        "sklearn:wine": "data.label_field=kind: has no meaning for data.source=sklearn:wine",
    }.items():
        with pytest.raises(ConfigError, match=message):
            configured(source)


def test_a_run_records_the_shape_and_loads_without_the_file(tmp_path: Path) -> None:
    """The classes are in resolved.yaml: a model is built from it where the table is gone."""
    path = write_csv(tmp_path / "my.csv", rows_of(300))
    run_dir = tmp_path / "run"
    own = [
        "train.task=classification",
        f"data.source={path}",
        "data.label_field=kind",
        "data.holdout=0.2",
        "train.steps=40",
        "model.layers=1",
        "train.eval_sequences=40",
        "train.global_batch=24",
        f"train.run_dir={run_dir}",
    ]
    run = dmoe.train(load(None, [*SMALL, *own]), quiet=True)
    assert run.metrics.of("eval")[-1]["accuracy"] > 0.9, "three centres, far apart"
    path.unlink()
    assert load(run_dir / "resolved.yaml").data.classes == ["a", "b", "c"]
    assert dmoe.load(run_dir).widths == [3]
