"""Results of one run, the comparison of several, and reports of runs without bits per byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dmoe.report import write_report
from dmoe.report.comparison import comparison_json, comparison_lines
from dmoe.report.format import text_table
from dmoe.report.results import result_lines
from dmoe.report.run import Record, load_runs, summarize
from dmoe.runs.metrics_log import Metrics, read_metrics_tolerant
from tests.report.pages import read_page
from tests.report.runs import line, write

START = {
    "task": "language_modelling",
    "parameters": 1_234_567,
    "active_parameters": 400_000,
    "trainable_parameters": 40_000,
    "flops_per_token": 800_000,
    "world": 2,
    "ep": 2,
    "data": "4641d4",
}
WHOLE = START | {"trainable_parameters": 1_234_567}
BEFORE = {name: {"loss": 2.0, "bits_per_byte": 2.9, "tokens": 512.0} for name in ("de", "fr", "zh")}
AFTER = BEFORE | {
    "de": {"loss": 1.5, "bits_per_byte": 2.21, "tokens": 512.0},
    "zh": {"loss": 2.0, "bits_per_byte": 2.9000000000000004, "tokens": 512.0},
}
Line = dict[str, Any]


def results_of(*lines: Line) -> list[str]:
    return result_lines(Metrics(list(lines), [], 0))


def train(step: int, **more: Any) -> Line:
    values = {
        "loss": 2.5,
        "tokens": step * 3072,
        "tokens_per_second": 20_000.0 + step,
        "drop_rate": 0.012,
    } | more
    return line(
        "train",
        step,
        **{"load_max_over_mean": 1.4, "layers": [{"layer": 1, "load": [1, 3]}]} | values,
    )


def evaluation(step: int, **more: Any) -> Line:
    return line("eval", step, **{"loss": 2.0, "bits_per_byte": 2.9, "tokens": 1536} | more)


def classification_run(path: Path) -> Path:
    """Write a classification run."""
    lines = [line("start", 0, **(WHOLE | {"task": "classification", "data": "d161"}))]
    lines += [train(step, tokens=64 * step, accuracy=0.5) for step in (1, 2)]
    lines += [line("eval", 1, loss=0.5, accuracy=0.9612, tokens=360)]
    lines += [
        line(
            "eval", 2, loss=0.3, accuracy=0.9512, tokens=360, missing={"pixels": 0.6, "shape": 0.9}
        )
    ]
    given = (
        "train.task=classification",
        "data.source=sklearn:digits",
        "data.streams=[pixels,strokes]",
    )
    return write(path, [*lines, line("end", 2, accuracy=0.9512)], *given)


def cells(lines: list[str], start: str) -> list[str]:
    found = [words for words in map(str.split, lines) if words and words[0] == start]
    assert len(found) == 1, lines
    return found[0]


def test_results_have_metric_and_cost() -> None:
    times = [{"data": 0.5, "forward": 1.5}, {"data": 0.5, "forward": 6.0, "other": 1.5}]
    steps = [train(n, step_time=time) for n, time in enumerate(times, 1)]
    lines = results_of(line("start", 0, **START), *steps, evaluation(2))
    text = "\n".join(lines)
    for words in (
        "step time for data           10.00%",
        "result after 2 steps",
        "validation bits/byte         2.9000",
        "trainable parameters         40,000",
        "forward FLOPs per token      800 k",
        "training FLOPs in total      14.7 G at most",  # 3 x 800,000 x 6,144
        "training tokens              6,144",
        "tokens per second            20,002",  # the median of two
        "final drop rate              1.20%",
        "ranks                        2, expert-parallel size 2",
    ):
        assert words in text, text
    assert "accuracy" not in text
    assert "domain" not in text


def test_unrecorded_quantities_are_left_out() -> None:
    assert results_of() == ["result after 0 steps"]
    assert results_of(line("start", 0, world=1, ep=1)) == [
        "result after 0 steps",
        "  ranks  1, expert-parallel size 1",
    ]
    dense = results_of(
        line("start", 0, **WHOLE), train(1, layers=[], drop_rate=0.0, load_max_over_mean=1.0)
    )
    assert not [
        text
        for text in dense
        if "drop" in text or "max/mean" in text or "trainable" in text or "at most" in text
    ]


def test_a_domain_is_unchanged_only_to_the_last_bit() -> None:
    """Equal to four digits is not unchanged."""
    lines = results_of(
        line("start", 0, **START),
        evaluation(0, by_domain=BEFORE),
        train(5),
        evaluation(5, by_domain=AFTER),
    )
    assert cells(lines, "fr") == ["fr", "2.9000", "2.9000", "="]
    assert cells(lines, "de") == ["de", "2.9000", "2.2100", "-0.6900"]
    assert cells(lines, "zh") == ["zh", "2.9000", "2.9000", "+4.4e-16"]


def test_an_equal_accuracy_is_not_unchanged() -> None:
    """An equal accuracy with another loss is not unchanged."""
    before = {name: {"loss": 1.0, "accuracy": 0.5, "tokens": 8.0} for name in ("cats", "dogs")}
    after = before | {"dogs": {"loss": 1.25, "accuracy": 0.5, "tokens": 8.0}}
    lines = results_of(
        line("eval", 0, accuracy=0.5, by_domain=before),
        line("eval", 3, accuracy=0.5, by_domain=after),
    )
    assert cells(lines, "cats") == ["cats", "50.00%", "50.00%", "="]
    assert cells(lines, "dogs") == ["dogs", "50.00%", "50.00%", "+0.00%"]


def test_new_domains_and_unprintable_names() -> None:
    strange = "a\nb\x1b[31m"
    lines = results_of(
        evaluation(0, by_domain={"de": BEFORE["de"]}),
        evaluation(5, by_domain={"de": BEFORE["de"], strange: AFTER["de"]}),
    )
    assert cells(lines, "a") == ["a", "b", "[31m", "-", "2.2100", "-"]
    assert all(text.isprintable() for text in lines)
    once = results_of(evaluation(5, by_domain=BEFORE))
    assert cells(once, "fr") == ["fr", "2.9000"], "one evaluation has nothing to be compared with"


def test_expert_loads() -> None:
    many = list(range(40))
    few = results_of(train(1, layers=[{"layer": 1, "load": [1, 3], "drop_rate": 0.25}]))
    assert cells(few, "1") == ["1", "25.0%", "25.0", "75.0"]
    lines = results_of(train(1, layers=[{"layer": 0, "load": many, "drop_rate": 0.0}]))
    assert cells(lines, "0") == [
        "0",
        "0.0%",
        "39:",
        "5.00,",
        "38:",
        "4.87,",
        "37:",
        "4.74",
        "0:",
        "0.00,",
        "1:",
        "0.13,",
        "2:",
        "0.26",
        "1",
    ]


def test_cost_share_and_experts_per_token() -> None:
    used = train(1, layers=[{"layer": 2, "load": [3, 1], "drop_rate": 0.0, "cost_share": 0.41}])
    hard = [{"layer": 2, "k_loss": [[1, 1400, 1.25], [2, 100, 2.5]], "k_loss_correlation": 0.25}]
    lines = results_of(used, evaluation(1, layers=hard))
    assert "  layer  dropped   cost     0     1" in lines
    assert [text.split() for text in lines if text.startswith("  2 ")] == [
        ["2", "0.0%", "41.0%", "75.0", "25.0"],
        ["2", "1", "1,400", "1.2500"],
        ["2", "2", "100", "2.5000"],
    ]
    assert "  correlation of the two: layer 2 +0.250" in lines


def test_a_missing_stream(tmp_path: Path) -> None:
    lines = result_lines(
        read_metrics_tolerant(classification_run(tmp_path / "run") / "metrics.jsonl")
    )
    assert cells(lines, "none") == ["none", "95.12%"]
    assert cells(lines, "pixels") == ["pixels", "60.00%", "-35.12%"]
    assert "  training samples              128" in lines
    assert not [text for text in lines if "byte" in text or "token" in text]


def test_the_end_line_does_not_change_the_results() -> None:
    """The trainer prints the results before it writes the `end` line, `dmoe compare` after it."""
    before = [line("start", 0, **START), train(1), evaluation(1, by_domain=BEFORE)]
    assert results_of(*before) == results_of(
        *before, line("end", 1, bits_per_byte=2.9) | {"time": 2e9}
    )


def test_seconds_are_summed_over_processes(tmp_path: Path) -> None:
    """Repeated steps count twice; a pause between two processes does not count."""
    pause = 30_000
    lines = [
        line("start", 0, **START),
        train(10),
        train(20),
        line("restart", 10, resumed_from=10, **START),
        train(20),
        evaluation(20),
    ]
    for index, item in enumerate(lines):
        item["time"] += pause * (index > 2)
    lines[3]["time"] = lines[2]["time"] + pause
    lines[4]["time"] = lines[5]["time"] = lines[3]["time"] + 7
    metrics = read_metrics_tolerant(write(tmp_path / "run", lines) / "metrics.jsonl")
    assert len(metrics.void) == 1
    assert summarize(Record(metrics)).seconds == 27


def test_several_runs_have_rows_and_remarks(tmp_path: Path) -> None:
    text = [line("start", 0, **START), train(1), evaluation(1), line("end", 1)]
    other = [
        line("start", 0, **WHOLE),
        train(1),
        evaluation(1, bits_per_byte=2.5, tokens=4),
        line("checkpoint", 1),
    ]
    paths = [
        write(tmp_path / "text", text),
        write(tmp_path / "other", other),
        classification_run(tmp_path / "digits"),
    ]
    runs = load_runs(paths)
    # the settings that differ come first
    lines = comparison_lines(runs, 400)
    lines = lines[lines.index("") + 1 :]
    assert cells(lines, "run")[1:3] == ["bits/byte", "accuracy"]
    assert lines[2].split()[:3] == ["text", "2.9000", "-"]
    assert lines[3].split()[:4] == ["other", "*", "2.5000", "-"]
    assert lines[4].split()[:3] == ["digits", "-", "95.12%"]
    remarks = "\n".join(lines[6:])
    for words in (
        "* other: no end was recorded; the last line is of step 1",
        "Different tasks have different metrics: text, other (bits/byte); digits (accuracy).",
        "Trained and evaluated on different data: text, other (data 4641d4); digits (data d161).",
        "upper bound for text:",
    ):
        assert words in remarks, remarks
    two = comparison_lines(runs[:2], 400)
    assert (
        "Evaluated on different numbers of validation tokens: text (1,536 tokens); other (4 tokens)."
        in two
    )
    assert [row["finished"] for row in comparison_json(runs)["runs"]] == [True, False, True]


def test_comparable_runs_have_no_remark(tmp_path: Path) -> None:
    lines = [line("start", 0, **WHOLE), train(1), evaluation(1), line("end", 1)]
    found = comparison_lines(load_runs([write(tmp_path / name, lines) for name in ("a", "b")]), 120)
    assert len(found) == 4
    assert "trained" not in found[1], "all of it is trained: no column"


@pytest.mark.parametrize("width", [12, 40, 80, 120])
def test_a_table_fits_its_width(width: int) -> None:
    """Columns that do not fit follow below, with the row names repeated; none is lost."""
    head = ["name", *(f"of\ncolumn{number}" for number in range(12))]
    rows = [["a", *map(str, range(12))], ["long", *map(str, range(100, 112))]]
    lines = text_table(head, rows, width, indent=1)
    assert max(map(len, lines)) <= max(width, len(" long  column10"))
    below = [words for words in map(str.split, lines) if words and words[0] == "long"]
    assert [number for words in below for number in words[1:]] == rows[1][1:]


def test_a_report_of_a_classification_run(tmp_path: Path) -> None:
    """Regression: classification runs had no validation metric and no curve of it."""
    page = read_page(write_report([classification_run(tmp_path / "run")], tmp_path / "r.html"))
    assert page.curve("accuracy", "validation") == {1: 0.9612, 2: 0.9512}
    assert page.curve("accuracy", "training") == {1: 0.5, 2: 0.5}
    assert "bits-per-byte" not in page.data["charts"]
    assert "Validation 95.1% accuracy (best 96.1% accuracy at step 1)" in page.text
    assert (
        "Model: a classifier of the streams pixels, strokes, concatenated; "
        "2 residual feed-forwards of width 32" in page.text
    )
    assert "Batch: 8 samples per step; 10 steps (80 samples). Data: sklearn:digits." in page.text


def test_a_report_has_the_table_by_domain(tmp_path: Path) -> None:
    run = write(
        tmp_path / "run",
        [
            line("start", 0, **START),
            evaluation(0, by_domain=BEFORE),
            evaluation(5, by_domain=AFTER),
        ],
    )
    page = read_page(write_report([run], tmp_path / "r.html"))
    assert "Validation, by domain" in page.text
    assert "fr 2.9000 2.9000 = zh 2.9000 2.9000 +4.4e-16" in page.text
