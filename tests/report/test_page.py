"""Content of the report against the metrics, for complete, killed, old and hostile runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dmoe.config.errors import ConfigError
from dmoe.report import write_report
from dmoe.runs.metrics_log import read_metrics_tolerant
from tests.report.pages import Page, read_page
from tests.report.runs import HOSTILE, line, old_layer, write, write_run


def train_lines(run: Path) -> dict[int, dict[str, Any]]:
    return {item["step"]: item for item in read_metrics_tolerant(run / "metrics.jsonl").of("train")}


def report_page(path: Path, *runs: Path) -> Page:
    return read_page(write_report(list(runs), path / "report.html"))


def test_load_matrix_equals_the_metrics(full_run: Path, one: Path) -> None:
    lines, page = train_lines(full_run), read_page(one)
    for layer in range(2):
        view = page.view("load", f"0|{layer}")
        assert view["x"] == sorted(lines)
        for expert, row in enumerate(view["z"]):
            assert row == [lines[step]["layers"][layer]["load"][expert] for step in view["x"]]
    last = page.view("load-last", "0")
    assert last["z"] == [row["load"] for row in lines[60]["layers"]]


def test_curves_equal_the_metrics(full_run: Path, one: Path) -> None:
    lines, page = train_lines(full_run), read_page(one)
    evals = {
        item["step"]: item for item in read_metrics_tolerant(full_run / "metrics.jsonl").of("eval")
    }

    def same(curve: dict[int, float | None], expected: dict[int, float]) -> None:
        assert curve == pytest.approx(expected, rel=1e-5)

    same(page.curve("Loss", "training"), {step: item["loss"] for step, item in lines.items()})
    same(page.curve("Loss", "validation"), {step: item["loss"] for step, item in evals.items()})
    same(
        page.curve("Bits per byte", "training"),
        {step: item["bits_per_byte"] for step, item in lines.items()},
    )
    same(
        page.curve("drop-rate", "Drop rate"),
        {step: item["drop_rate"] for step, item in lines.items()},
    )
    same(
        page.curve("time-split", "exchange", "0"),
        {step: item["step_time"]["exchange"] for step, item in lines.items()},
    )
    same(
        page.curve("grad-norm", "router"),
        {step: item["grad_norm_router"] for step, item in lines.items()},
    )
    mean = {
        step: sum(row["router_entropy"] for row in item["layers"]) / 2
        for step, item in lines.items()
    }
    same(page.curve("entropy", "Router entropy"), mean)
    second = {
        step: sum(row["drop_rate_by_choice"][1] for row in item["layers"]) / 2
        for step, item in lines.items()
    }
    same(page.curve("drop-by-choice", "choice 2", "0"), second)
    quantities = page.data["charts"]["by-layer"]["choices"][1]["options"]
    key = f"0|{quantities.index('Largest router logit')}"
    same(
        page.curve("by-layer", "layer 1", key),
        {step: item["layers"][1]["logit_max"] for step, item in lines.items()},
    )


def test_matrices_equal_the_last_lines(full_run: Path, one: Path) -> None:
    page = read_page(one)
    rows = [layer["traffic"] for layer in train_lines(full_run)[60]["layers"]]
    assert page.view("traffic", "0|1")["z"] == rows[0]
    assert page.view("traffic", "0|0")["z"] == [
        [a + b for a, b in zip(*pair, strict=True)] for pair in zip(*rows, strict=True)
    ]
    last = read_metrics_tolerant(full_run / "metrics.jsonl").of("eval")[-1]["layers"][1]
    assert page.view("domains", "0|1")["y"] == list(last["domains"])
    assert page.view("domains", "0|1")["z"] == list(last["domains"].values())
    pairs = last["co_selection"]
    apart = [
        [None if i == j else value for j, value in enumerate(row)] for i, row in enumerate(pairs)
    ]
    assert page.view("co-selection", "0|1")["z"] == apart


def test_void_lines_are_in_the_event_table_only(tmp_path: Path) -> None:
    before = [
        line("train", 2, loss=9.0),
        line("alert", 2, title="routing", text="expert 7 is dead"),
        line("checkpoint", 2, seconds=1.5),
    ]
    run = write(
        tmp_path / "run",
        [
            line("train", 1, loss=8.0),
            *before,
            line("restart", 1, resumed_from=1),
            line("train", 2, loss=7.0),
        ],
    )
    page = report_page(tmp_path, run)
    assert page.curve("Loss", "training") == {1: 8, 2: 7}
    assert "seconds 1.5 s; void after a later restart" in page.text
    assert "Alerts 1 expert 7 is dead" in page.text
    assert "1 measurement(s) of steps that a restart repeated are left out" in page.text
    assert [mark["kind"] for mark in page.data["marks"][0]] == ["alert", "restart"]


def test_several_runs_are_overlaid(two: Path) -> None:
    page = read_page(two)
    names = page.data["runs"]
    assert names == ["<b onclick=alert(1)>one&amp;", "two"]
    drawn = [curve["name"] for curve in page.quality("Loss")["curves"]]
    assert drawn == [f"{name}, {part}" for name in names for part in ("training", "validation")]
    colours = {curve["name"]: curve["colour"] for curve in page.quality("Loss")["curves"]}
    assert colours["two, training"] == colours["two, validation"] != colours[drawn[0]]
    assert page.view("load", "1|0")["y"] == list(range(16))
    # The second run has one layer.
    assert "1|1" not in page.data["charts"]["load"]["views"]
    assert re.search(r"Settings that differ, and results .*moe\.num_experts 8 16", page.text)
    assert "train.run_dir" not in page.text


def test_runs_of_one_name_get_distinct_names(tmp_path: Path) -> None:
    runs = [write(tmp_path / parent / "run", [line("train", 1, loss=1.0)]) for parent in ("a", "b")]
    # one that is given twice is one run
    assert report_page(tmp_path, *runs, runs[0]).data["runs"] == ["a/run", "b/run"]


def test_a_run_that_was_killed_before_its_first_step(tmp_path: Path) -> None:
    """The report of a run without steps is a page with sentences, not a traceback."""
    page = report_page(
        tmp_path, write(tmp_path / "run", [line("start", 0, world=1, ep=1)], torn='{"event": "tr')
    )
    assert page.data["charts"] == {}
    assert "No gradient norm was recorded." in page.text
    assert "still running, or killed" in page.text
    assert "1 line(s) of metrics.jsonl could not be read" in page.text
    assert "Each rank has all experts, so no row is sent." in page.text


def test_a_run_directory_with_only_a_config(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [])
    (run / "metrics.jsonl").unlink()
    page = report_page(tmp_path, run)
    assert "No event was recorded." in page.text
    assert "Choice: 2 of 8 experts per token" in page.text


def test_a_run_of_the_first_version(tmp_path: Path) -> None:
    """No step times, entropy or traffic: missing charts are reported, the others drawn."""
    lines = [
        line(
            "train",
            step,
            loss=5.0 - step,
            drop_rate=0.1,
            load_max_over_mean=2.0,
            layers=[old_layer(0, [step, 3, 2, 7])],
        )
        for step in (1, 2, 3)
    ]
    page = report_page(tmp_path, write(tmp_path / "run", [line("start", 0, world=2, ep=2), *lines]))
    assert page.view("load", "0|0")["z"] == [[1, 2, 3], [3, 3, 3], [2, 2, 2], [7, 7, 7]]
    assert {"entropy", "time-split", "traffic", "domains", "drop-by-choice"}.isdisjoint(
        page.data["charts"]
    )
    assert "Entropy and certainty of the router were not recorded" in page.text
    assert "Rows between ranks were not recorded" in page.text
    assert "No load by domain was recorded" in page.text


def test_an_unreadable_config_is_reported_and_curves_are_drawn(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [line("train", 1, loss=1.0)])
    (run / "resolved.yaml").write_text("moe:\n  colour: blue\n", encoding="utf-8")
    page = report_page(tmp_path, run)
    assert "cannot read the run's resolved.yaml" in page.text
    assert "moe.colour" in page.text
    assert "loss" in page.data["charts"]


def test_invalid_values_are_gaps(tmp_path: Path) -> None:
    """A NaN loss is null in the file. Known keys with other types are not drawn."""
    odd = {
        "loss": None,
        "aux": [1],
        "time": 3,
        "layers": [{"layer": 0, "load": [1, None], "traffic": [[1], [2, 3]], "aux": "x"}, 7],
    }
    page = report_page(
        tmp_path,
        write(
            tmp_path / "run",
            [line("train", 1, loss=2.0), line("train", 2, **odd), line("train", 3, loss=1.0)],
        ),
    )
    assert page.quality("Loss")["curves"][0]["y"] == [2, None, 1]
    assert set(page.data["charts"]) == {"loss"}


def test_text_from_outside_is_escaped(full_run: Path, other_run: Path, two: Path) -> None:
    """Markup in names of runs, alerts and samples is text in the page and in its data."""
    page, source = read_page(two), two.read_text(encoding="utf-8")
    names = {name for _, attributes in page.tags for name in attributes}
    assert not {name for name in names if name.startswith("on")}
    assert not [
        tag for tag, _ in page.tags if tag in ("img", "b", "iframe", "object", "embed", "base")
    ]
    assert [
        attributes["href"]
        for tag, attributes in page.tags
        if tag in ("a", "link") and not attributes["href"].startswith("#")
    ] == ["data:,"]
    assert not [attributes for _, attributes in page.tags if "src" in attributes]
    body = source[: source.index("<script")]
    assert "<img" not in body
    assert "&lt;/script&gt;&lt;img src=x onerror=&quot;" in body
    assert source.count("</script>") == 2
    data = source[source.index('id="report-data">') :].removeprefix('id="report-data">')
    assert "<" not in data[: data.index("</script>")]
    assert [mark["text"] for mark in page.data["marks"][0] if HOSTILE in mark["text"]] == [
        f"expert 3 of layer 0 is dead {HOSTILE}"
    ]


def test_the_security_policy_lists_the_scripts(one: Path) -> None:
    policy = next(
        a["content"] for tag, a in read_page(one).tags if tag == "meta" and a.get("http-equiv")
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.split(";")[1]
    assert "unsafe-eval" not in policy


@pytest.mark.slow
def test_size_of_the_report_of_a_large_run(tmp_path: Path) -> None:
    """100,000 steps, and 48 layers of 64 experts: within 5 MB, and the only spike is kept."""
    lines = [
        line("train", step, loss=1.0 if step != 54_320 else 50.0, grad_norm=step * 1e-5)
        for step in range(10, 100_001, 10)
    ]
    wide = [
        line(
            "train",
            step,
            loss=1.0,
            layers=[old_layer(n, [step % 97 + 1000 + e for e in range(64)]) for n in range(48)],
        )
        for step in range(10, 4001, 10)
    ]
    page = report_page(tmp_path, write(tmp_path / "long", lines), write(tmp_path / "wide", wide))
    assert page.curve("Loss", "long, training")[54_320] == 50
    assert (tmp_path / "report.html").stat().st_size < 5e6
    assert len(page.view("load", "1|47")["x"]) >= 24


def test_the_report_is_written_atomically(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [line("train", 1, loss=1.0)])
    with pytest.raises(OSError, match="No such file"):
        write_report([run], tmp_path / "nowhere" / "report.html")
    with pytest.raises(ConfigError, match="is not a run directory"):
        write_report([run, tmp_path], tmp_path / "report.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    written = write_report([run], tmp_path / "report.html")
    assert write_report([run], written) == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]


def test_a_report_does_not_import_torch(tmp_path: Path) -> None:
    """The trainer writes a report at the end of each run, and `dmoe report` must be fast."""
    run = write_run(tmp_path / "run", 10)
    code = "import sys; from pathlib import Path; from dmoe.report import write_report\n"
    code += "write_report([Path(sys.argv[1])], Path(sys.argv[1]) / 'r.html')\n"
    code += "print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.strip() == "False"
