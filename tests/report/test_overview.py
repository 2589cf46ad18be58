"""The first screen, quantities without a chart, events, and the size of the page."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dmoe.report import write_report
from dmoe.report.charts import Chart, describe_constant
from dmoe.report.overview import (
    balanced_since,
    build_overview,
    compare_runs,
    describe_run,
    facts,
    tiles,
)
from dmoe.report.quality import smooth_values
from dmoe.report.run import load_runs
from dmoe.runs.metrics_log import MetricsFile
from tests.report.pages import read_page
from tests.report.runs import Line, eval_line, line, train_line, write

START = {
    "parameters": 1000,
    "world": 2,
    "ep": 2,
    "data": "4641d4",
    "command": "dmoe train --ranks 2",
    "commit": "0123456789abcdef",
    "dirty": True,
    "machine": "two cores",
}


def step(number: int, largest: float, drops: float = 0.0) -> Line:
    layers = [{"layer": 0, "load": [1, 1]}]
    values = {"load_max_over_mean": largest, "drop_rate": drops, "layers": layers}
    return line("train", number, loss=3.0, bits_per_byte=2.0, tokens_per_second=5000, **values)


def evaluation(number: int, bits: float) -> Line:
    return line("eval", number, loss=2.0, bits_per_byte=bits, tokens=64)


def test_one_sentence_has_what_a_reader_asks(tmp_path: Path) -> None:
    lines = [
        line("start", 0, **START, resumed_from=0),
        *(step(number, largest) for number, largest in ((1, 3.0), (2, 1.9), (3, 2.5))),
        *(step(number, 1.25) for number in (4, 5)),
        evaluation(5, 1.85),
        line("alert", 3, title="routing", text="dead experts: layer 0; this usually helps: x"),
        line("alert", 4, text="a note is no alert"),
        line("end", 5),
    ]
    (run,) = load_runs([write(tmp_path / "good", lines)])
    assert describe_run(run) == (
        "Finished after step 5 with 1.850 validation bits per byte; balanced from step 4 on (no "
        "expert above 2 times the mean load); nothing dropped; 1 alert."
    )
    assert balanced_since(run) == 4
    assert [(tile.title, tile.value, tile.state) for tile in tiles(run)] == [
        ("Validation bits per byte", "1.850", ""),
        ("Tokens per second", "5 k", ""),
        ("Balance", "1.25", "good"),
        ("Drops", "0%", "good"),
        ("Alerts", "1", "warn"),
    ]
    assert tiles(run)[4].detail == "dead experts"
    found = facts(run)
    assert found["Command"] == "dmoe train --ranks 2"
    assert found["Commit"] == "0123456789ab, with changes that are not committed"
    assert (found["Machine"], found["Data"]) == ("two cores", "synthetic:zipf (fingerprint 4641d4)")
    assert found["Began"] == "2026-09-21 14:13:20 UTC"


def test_the_sentence_of_a_run_that_went_wrong(tmp_path: Path) -> None:
    lines = [step(1, 1.0, 0.5), evaluation(1, 2.5), step(2, 3.5, 0.25), evaluation(2, 2.75)]
    (run,) = load_runs([write(tmp_path / "bad", [line("start", 0, **START), *lines])])
    assert describe_run(run) == (
        "No end was recorded; the last line is of step 2: still running, or killed with 2.750 "
        "validation bits per byte; not balanced: the busiest expert has 3.5 times the mean load; "
        "25% dropped; no alert."
    )
    validation, _, balance, drops, alerts = tiles(run)
    assert validation.detail == "best 2.500 at step 1"
    assert (balance.state, drops.state, alerts.state) == ("warn", "warn", "good")
    assert drops.detail == "most 50% at step 1"


def test_a_run_without_anything(tmp_path: Path) -> None:
    (run,) = load_runs([write(tmp_path / "empty", [])])
    overview = build_overview([run], [])
    assert [tile.value for tile in overview.tiles] == ["-", "-", "-", "-", "0"]
    assert overview.charts == []


def test_several_runs_start_with_what_differs_and_mark_the_best(tmp_path: Path) -> None:
    given = {"a": (2.0, 1.2, "moe.top_k=1"), "b": (1.5, 1.4, "moe.top_k=2"), "c": (1.5, 1.2, "")}
    paths = []
    for name, (bits, largest, override) in given.items():
        lines = [line("start", 0, **START), step(1, largest), evaluation(1, bits), line("end", 1)]
        overrides = [override] if override else ["moe.top_k=2"]
        paths.append(write(tmp_path / name, lines, *overrides))
    table = compare_runs(load_runs(paths))
    rows = {row[0]: row[1:] for row in table.rows}
    assert next(iter(rows)) == "moe.top_k"
    assert table.head == ["", "a", "b", "c"]
    marked = {(table.rows[row][0], table.head[column]) for row, column in table.best}
    assert ("Validation bits per byte", "b") in marked
    assert ("Validation bits per byte", "c") in marked
    assert ("Validation bits per byte", "a") not in marked
    assert {name for title, name in marked if title.startswith("Balance")} == {"a", "c"}
    assert not [name for title, name in marked if title == "Drops"], "all alike: none is best"
    page = read_page(write_report(paths, tmp_path / "report.html"))
    assert "1.5000 best" in page.text
    assert "b, c have the best validation bits per byte: 1.500." in page.text
    assert page.text.count("Weights: the chosen experts' scores") == 1, "common settings once"


def test_what_is_constant_is_a_line_and_no_chart(tmp_path: Path) -> None:
    """Six empty charts of drops for a dropless run, and one point of routing changes, were drawn."""
    lines = [step(number, 1.0 + number / 10) for number in range(1, 9)]
    lines.append(line("eval", 8, loss=1.0, layers=[{"layer": 0, "stability": 0.25}]))
    page = read_page(write_report([write(tmp_path / "run", lines)], tmp_path / "r.html"))
    assert "Without a chart: Drop rate: 0%." in page.text
    assert "Routing changes: 25% (step 8 only)" in page.text
    assert {"drop-rate", "stability"}.isdisjoint(page.data["charts"])
    assert "max-over-mean" in page.data["charts"]


def test_constant_charts() -> None:
    def chart(unit: str, **curves: list[float | None]) -> Chart:
        drawn = [{"name": name, "x": [1, 2], "y": values} for name, values in curves.items()]
        return Chart("id", "T", "", "curves", {"": {"curves": drawn}}, {"x": "step", "y": unit})

    once = describe_constant(chart("share", a=[0.5, None], b=[0.5, 0.5]))
    assert once == "T: a 50% (step 1 only), b 50%"
    assert describe_constant(chart("share", a=[0.5, 0.5], b=[0.5, 0.5])) == "T: 50%"
    assert describe_constant(chart("nats", a=[1, 1], b=[2, 2])) == "T: a 1 nats, b 2 nats"
    assert describe_constant(chart("nats", a=[1, 1], b=[2, 3])) is None


def test_events_have_evaluations_and_no_resume_of_a_fresh_run(tmp_path: Path) -> None:
    lines = [
        line("start", 0, world=1, ep=1, resumed_from=0, attempt=0),
        evaluation(2, 1.5),
        line("checkpoint", 2, seconds=0.5, held=0.3644),
    ]
    page = read_page(write_report([write(tmp_path / "run", lines)], tmp_path / "r.html"))
    assert "resumed from" not in page.text
    assert "evaluation 2 loss 2; bits per byte 1.5; tokens 64" in page.text
    assert "training waited 0.364 s" in page.text


def test_smoothing_is_the_formula() -> None:
    draw = random.Random(0)
    values = [None if index == 7 else draw.random() for index in range(30)]
    decay = 2.0 ** (-60 / 30)
    for index, found in enumerate(smooth_values(values)):
        if values[index] is None:
            assert found is None
            continue
        known = [
            (decay ** abs(index - i), value) for i, value in enumerate(values) if value is not None
        ]
        assert found == pytest.approx(sum(w * v for w, v in known) / sum(w for w, _ in known))


def test_the_elapsed_time_has_no_pauses(tmp_path: Path) -> None:
    lines = [line("start", 0), step(1, 1.0), step(2, 1.0)]
    lines += [line("restart", 2, resumed_from=2), step(3, 1.0)]
    for item in lines[3:]:
        item["time"] += 5000
    lines[4]["time"] = lines[3]["time"] + 7
    page = read_page(write_report([write(tmp_path / "run", lines)], tmp_path / "r.html"))
    assert page.quality("Loss")["curves"][0]["seconds"] == [1, 2, 9]


def test_the_page_of_the_quickstart_is_small(tmp_path: Path) -> None:
    """It had 4.9 MB, nearly all of it a plotting library. 600 steps, logged every 10."""
    draw = random.Random(0)
    path = write(tmp_path / "run", [])
    file = MetricsFile(path / "metrics.jsonl")
    for number in range(10, 601, 10):
        item = train_line(draw, number, 600, layers=4, experts=8, ranks=2)
        file.write(
            "train", number, {key: item[key] for key in item.keys() - {"event", "step", "time"}}
        )
    file.close()
    assert write_report([path], tmp_path / "report.html").stat().st_size < 300_000


def test_the_page_of_16_layers_of_64_experts_is_below_4_MB(tmp_path: Path) -> None:
    """More steps are thinned: 700 give every chart its largest size but the simple curves."""
    draw = random.Random(0)
    lines: list[Line] = []
    for number in range(1, 701):
        item = line("train", number, loss=draw.random(), bits_per_byte=draw.random())
        layers = []
        for layer in range(16):
            load = [draw.randrange(1_000_000) for _ in range(64)]
            quantities = ("load_cv", "load_max_over_mean", "router_entropy", "logit_max")
            layers.append(
                {"layer": layer, "load": load, **{name: draw.random() for name in quantities}}
            )
        lines.append(item | {"layers": layers})
    lines.append(eval_line(draw, 700, 700, 16, 64))
    path = write_report([write(tmp_path / "run", lines)], tmp_path / "report.html")
    page = read_page(path)
    assert len(page.view("load", "0|15")["x"]) == 600
    assert len(page.view("co-selection", "0|15")["z"]) == 64
    assert path.stat().st_size < 4_000_000
