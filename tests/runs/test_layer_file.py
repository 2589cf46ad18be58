"""`metrics.layers.bin`: exact in small runs, small in large ones, and in step with metrics.jsonl."""

from __future__ import annotations

import json
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoe.config.errors import ConfigError
from dmoe.runs import layer_columns
from dmoe.runs.layer_columns import decode, encode, split
from dmoe.runs.metrics_follower import MetricsFollower
from dmoe.runs.metrics_log import MetricsFile, read_metrics, read_metrics_tolerant
from tests.report.runs import eval_line, train_line

NUMBERS = st.none() | st.integers(0, 2**40) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    NUMBERS | st.text() | st.booleans(),
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(), below, max_size=4),
    max_leaves=20,
)


def write(path: Path, *lines: dict[str, Any]) -> None:
    file = MetricsFile(path)
    for line in lines:
        values = {key: line[key] for key in line.keys() - {"event", "step", "time"}}
        file.write(line["event"], line["step"], values)
    file.close()


def trained(step: int, load: list[float]) -> dict[str, Any]:
    return {"event": "train", "step": step, "layers": [{"layer": 0, "load": load}]}


def wide_line(step: int, mean: float = 4096.0) -> dict[str, Any]:
    """Return a line of 16 layers, 64 experts and 8 ranks, with what the trainer logs."""
    draw = random.Random(step)
    line = train_line(draw, step, 1000, layers=16, experts=64, ranks=8)
    for row in line["layers"]:
        load = [float(round(mean * draw.lognormvariate(0, 0.6))) for _ in range(64)]
        load[draw.randrange(64)] = 0.0
        row["load"] = load
        row["kept"] = [min(count, round(1.25 * mean)) for count in load]
        row["load_by_rank"] = [sum(load[8 * rank : 8 * rank + 8]) for rank in range(8)]
        row["traffic"] = [
            [draw.randint(int(mean), int(8 * mean)) for _ in range(8)] for _ in range(8)
        ]
        row["drop_rate_by_choice"] = [draw.random() for _ in range(8)]
        row["dropped_mass_by_choice"] = [draw.random() for _ in range(8)]
        scalars = [key for key, value in row.items() if isinstance(value, float)]
        row |= {key: draw.gauss(0, 1) if "bias" in key else draw.random() for key in scalars}
        row["cost_share"] = draw.random()
    return line


def count(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(count, value.values()))
    return sum(map(count, value)) if isinstance(value, list) else 1


@pytest.mark.parametrize("mean", [12.0, 4096.0, 524_288.0])
def test_a_large_line_has_at_most_2_kB_and_a_byte_per_number(mean: float, tmp_path: Path) -> None:
    """One line of 16 layers of 64 experts on 8 ranks had 31 kB, those of a long run 3.7 GB."""
    path = tmp_path / "metrics.jsonl"
    lines = [wide_line(step, mean) for step in range(1, 41)]
    write(path, *lines)
    size = path.stat().st_size + (tmp_path / "metrics.layers.bin").stat().st_size
    numbers = sum(count(line["layers"]) for line in lines)
    assert numbers == 40 * 16 * (2 * 64 + 8 + 64 + 16 + 20)
    spec = len(split(lines[0]["layers"])[0]) + 20
    assert size <= 2000 * len(lines) + numbers + spec
    assert len(path.read_bytes().splitlines()[0]) < 1500
    check_error(lines, read_metrics(path))


def check_error(lines: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    for before, after in zip(lines, found, strict=True):
        assert {**after, "layers": 0, "time": 0} == {**before, "layers": 0, "time": 0}
        for key in ("load", "kept", "traffic"):
            columns = [[layer[key] for layer in line["layers"]] for line in (before, after)]
            old, new = (
                json.loads(f"[{str(c).replace('[', '').replace(']', '')}]") for c in columns
            )
            assert [value == 0 for value in old] == [value == 0 for value in new]
            assert max(old) == max(new)
            bound = (max(old) / min(value for value in old if value)) ** (1 / 508) - 1
            assert bound < 0.03
            for a, b in zip(old, new, strict=True):
                # half a count more, since counts stay whole
                assert abs(a - b) <= bound * a * 1.001 + 0.5
                assert b == int(b)
        for a, b in zip(before["layers"], after["layers"], strict=True):
            for key in ("layer", "dead_experts", "lost_tokens"):
                assert a[key] == b[key]
            for key in ("load_cv", "router_entropy", "bias_min"):
                assert b[key] == pytest.approx(a[key], rel=1e-6)


def test_a_small_run_is_exact(tmp_path: Path) -> None:
    """Lines of the quickstart's size: readers return what was written, to the last bit and type."""
    draw = random.Random(0)
    lines = []
    for step in range(1, 9):
        lines.append(train_line(draw, step, 8, layers=4, experts=8, ranks=2))
        lines.append(eval_line(draw, step, 8, 4, 8))
    lines[2]["layers"][1]["router_entropy"] = None
    path = tmp_path / "metrics.jsonl"
    write(path, *lines)
    expected = [{**line, "time": 0} for line in lines]
    assert [{**line, "time": 0} for line in read_metrics(path)] == expected
    assert [{**line, "time": 0} for line in MetricsFollower(path).poll()[0]] == expected
    assert read_metrics_tolerant(path).without_layers == 0
    assert type(read_metrics(path)[0]["layers"][0]["load"][0]) is int
    assert '"load"' not in path.read_text(encoding="utf-8")


@given(st.lists(VALUES, min_size=1, max_size=3))
def test_any_json_comes_back(layers: list[Any]) -> None:
    text, columns = split(layers)
    spec = json.loads(text)
    content = encode(columns, 1 << 30)
    found = decode(content, layer_columns.column_lengths(spec))
    assert layer_columns.join(spec, found) == layers


@given(st.lists(st.integers(0, 10**6) | st.floats(-1e30, 1e30), min_size=40, max_size=60))
def test_bytes_keep_extremes_and_their_bound(values: list[float]) -> None:
    path = ("x",)
    content = encode({path: values}, 0)
    assert len(content) <= len(values) + 17
    found = decode(content, {path: len(values)})[path]
    low, high = min(values), max(values)
    assert found[values.index(high)] == pytest.approx(high)
    if low < 0:
        assert all(abs(a - b) <= (high - low) / 509 for a, b in zip(values, found, strict=True))
    elif len(content) == len(values) + 17:
        positive = [value for value in values if value > 0]
        bound = (max(positive) / min(positive)) ** (1 / 508) - 1
        for a, b in zip(values, found, strict=True):
            assert abs(a - b) <= 1.0001 * bound * a + 0.5 * (type(a) is int)


def test_the_format_is_as_documented(tmp_path: Path) -> None:
    """Read by the words of the docstrings alone."""
    path = tmp_path / "metrics.jsonl"
    write(path, trained(1, [1, 300]), trained(2, [7.5, 0.0]))
    data = (tmp_path / "metrics.layers.bin").read_bytes()
    assert data[:8] == b"dmoelay1"
    (first, size), (second, _) = (
        json.loads(text)["layers_at"] for text in path.read_bytes().splitlines()
    )
    kind, length, checksum = struct.unpack_from("<4sII", data, 8)
    spec = data[20 : 20 + length]
    assert (kind, checksum) == (b"SPEC", zlib.crc32(spec))
    assert json.loads(spec) == [{"keys": {"layer": 0, "load": 2}}]
    assert first == 20 + length
    kind, length, checksum = struct.unpack_from("<4sII", data, first)
    content = data[first + 12 : first + 12 + length]
    assert (kind, checksum, size) == (b"DATA", zlib.crc32(content), 12 + length)
    # layer 0 in one byte; the load as two integers of two bytes
    assert content == struct.pack("<QBBBHH", 8, 0x81, 0, 0x82, 1, 300)
    content = data[second + 12 :]
    assert content == struct.pack("<QBBBff", 8, 0x81, 0, 4, 7.5, 0.0)


def test_a_resume_goes_on_with_both_files(tmp_path: Path) -> None:
    """The steps beyond the checkpoint are void, whatever their records hold."""
    path = tmp_path / "metrics.jsonl"
    write(path, *(trained(step, [step, 0]) for step in (1, 2, 3)))
    with (tmp_path / "metrics.layers.bin").open("ab") as file:
        file.write(b"DATA\x99")  # killed while it wrote the record of step 4
    back = {"event": "restart", "step": 2, "resumed_from": 2}
    write(path, back, trained(3, [0, 3]), trained(4, [0, 4]))
    found = [line for line in read_metrics(path) if line["event"] == "train"]
    assert [line["layers"][0]["load"] for line in found] == [[1, 0], [2, 0], [0, 3], [0, 4]]
    assert read_metrics_tolerant(path).void[0]["layers"][0]["load"] == [3, 0]


def test_lines_whose_records_are_lost(tmp_path: Path) -> None:
    """After a crash of the machine the last records may be missing, as a last line may be."""
    path, layers = tmp_path / "metrics.jsonl", tmp_path / "metrics.layers.bin"
    write(path, *(trained(step, [step, 5]) for step in (1, 2, 3)))
    whole = layers.read_bytes()
    layers.write_bytes(whole[:-3])
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    tolerant = read_metrics_tolerant(path)
    assert ([line["step"] for line in tolerant.lines], tolerant.without_layers) == ([1, 2, 3], 1)
    write(path, trained(3, [8, 8]))
    assert [line["layers"][0]["load"] for line in read_metrics(path)] == [[1, 5], [2, 5], [8, 8]]
    damaged = bytearray(layers.read_bytes())
    damaged[json.loads(path.read_bytes().splitlines()[0])["layers_at"][0] + 22] ^= 1
    layers.write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"line 1 has layers in metrics\.layers\.bin that are"):
        read_metrics(path)
    layers.unlink()
    assert read_metrics_tolerant(path).without_layers == 3
    follower = MetricsFollower(path)
    assert (len(follower.poll()[0]), follower.unreadable) == (3, 3)


def test_a_full_disk_writes_no_line_without_its_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write("train", 1, {"layers": [{"load": [1]}]})
    file._layers._write = lambda data: (_ for _ in ()).throw(OSError(28, "no space"))  # type: ignore[method-assign]
    with pytest.raises(OSError, match="no space"):
        file.write("train", 2, {"layers": [{"load": [2]}]})
    del file._layers._write
    file.write("train", 3, {"layers": [{"load": [3]}]})
    file.close()
    assert [line["layers"] for line in read_metrics(path)] == [[{"load": [1]}], [{"load": [3]}]]
