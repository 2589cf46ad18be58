"""Command `dmoe compare`: its output and its errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dmoe.cli.runs import compare, terminal_width
from dmoe.config.errors import ConfigError
from dmoe.report.comparison import comparison_lines
from dmoe.report.results import result_lines
from dmoe.report.run import load_runs
from dmoe.runs.metrics_log import read_metrics_tolerant
from dmoe.train.summary import print_summary
from tests.report.runs import line, write


@pytest.fixture
def run(tmp_path: Path) -> Path:
    start = {
        "parameters": 1234,
        "active_parameters": 600,
        "trainable_parameters": 30,
        "flops_per_token": 900,
    }
    measured = {
        "loss": 2.5,
        "tokens": 64,
        "tokens_per_second": 5.0,
        "load_max_over_mean": 1.5,
        "layers": [{"load": [1, 2]}],
    }
    lines = [line("start", 0, world=1, ep=1, **start), line("train", 1, **measured)]
    lines += [line("eval", 1, loss=2.0, bits_per_byte=2.875), line("end", 1)]
    return write(tmp_path / "run", lines)


def test_one_row_per_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`dmoe compare runs/*` counted the run that runs/latest links to twice."""
    (tmp_path / "latest").symlink_to(run)
    other = shutil.copytree(run, tmp_path / "other")
    compare([run, tmp_path / "latest", other])
    rows = capsys.readouterr().out.splitlines()[2:4]
    assert [row.split()[0] for row in rows] == ["run", "other"]
    assert all("2.8750" in row for row in rows)


def test_what_could_not_be_read_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report said it, and `compare`, also as JSON and with --full, showed a dash or less."""
    other = shutil.copytree(run, tmp_path / "other")
    with (other / "metrics.jsonl").open("a") as file:
        file.write('{"event": "eval", "st\n')
    (other / "metrics.layers.bin").unlink(missing_ok=True)
    (other / "resolved.yaml").write_text("moe: {experts_: 1}\n")
    for options in ({}, {"as_json": True}, {"full": True}):
        compare([run, other], **options)
        text = capsys.readouterr().out
        assert "other: 1 line(s) of metrics.jsonl could not be read" in text, options
        assert "cannot read the run's resolved.yaml" in " ".join(text.split()), options


def sweep_run(path: Path, seed: int, top_k: int, bits: float) -> Path:
    lines = [line("start", 0, world=1, ep=1), line("eval", 1, loss=2.0, bits_per_byte=bits)]
    return write(path, [*lines, line("end", 1)], f"train.seed={seed}", f"moe.top_k={top_k}")


def test_settings_that_differ_come_first_and_seeds_are_averaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        sweep_run(tmp_path / f"k{top_k}-{seed}", seed, top_k, bits)
        for top_k, seed, bits in [(1, 0, 2.5), (1, 1, 2.7), (2, 0, 2.0), (2, 1, 2.2)]
    ]
    compare(runs)
    tables = [part.splitlines() for part in capsys.readouterr().out.split("\n\n")]
    assert [row.split() for row in tables[0][1:]] == [
        ["run", "top_k", "seed"],
        ["k1-0", "1", "0"],
        ["k1-1", "1", "1"],
        ["k2-0", "2", "0"],
        ["k2-1", "2", "1"],
    ]
    assert "2.7000" in tables[1][3]
    assert tables[2][-2].split() == ["moe.top_k=1", "2", "2.6000", "(2.5000", "..", "2.7000)"]
    assert tables[2][-1].split() == ["moe.top_k=2", "2", "2.1000", "(2.0000", "..", "2.2000)"]
    compare(runs, as_json=True)
    found = json.loads(capsys.readouterr().out)["settings"]
    assert found == {"train.seed": ["0", "1", "0", "1"], "moe.top_k": ["1", "1", "2", "2"]}


def test_json_has_every_digit(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare([run], as_json=True)
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert (found["name"], found["bits_per_byte"], found["parameters"], found["drop_rate"]) == (
        "run",
        2.875,
        1234,
        None,
    )
    assert found["finished"] is True


def test_full_prints_the_results_of_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare([run], full=True)
    assert capsys.readouterr().out.splitlines() == result_lines(
        read_metrics_tolerant(run / "metrics.jsonl")
    )


def test_the_trainer_prints_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trainer prints the results before it writes the last line."""
    printed: list[str] = []
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "at-the-end.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
    logger = SimpleNamespace(
        metrics=object(),
        run=SimpleNamespace(metrics=run / "at-the-end.jsonl"),
        print=printed.append,
    )
    print_summary(logger)  # type: ignore[arg-type]
    compare([run], full=True)
    assert printed == ["\n" + capsys.readouterr().out.rstrip()]


def test_missing_results_are_a_note(tmp_path: Path) -> None:
    """Ranks without a metrics file read nothing."""
    printed: list[str] = []
    logger = SimpleNamespace(
        metrics=object(), run=SimpleNamespace(metrics=None), print=printed.append
    )
    print_summary(logger)  # type: ignore[arg-type]
    assert printed[0].startswith("note: no result table: ")
    assert "seconds" not in printed[0], "it did not wait"
    print_summary(SimpleNamespace(metrics=None, print=printed.append))  # type: ignore[arg-type]
    assert len(printed) == 1


def test_full_marks_unfinished_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line("start", 0), line("end", 3, stopped=True)]
    compare([write(tmp_path / name, lines) for name in ("run", "two")], full=True)
    output = capsys.readouterr().out
    assert "* run: stopped after step 3, and can be resumed." in output
    assert "\n\ntwo:\n" in output


def test_a_path_without_a_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run directory"):
        compare([run, tmp_path])
    with pytest.raises(ConfigError, match=r"--json.*does not go with --full"):
        compare([run], full=True, as_json=True)


@pytest.mark.parametrize(("given", "width"), [("20", 80), ("90", 90), ("200", 120)])
def test_the_table_fits_the_terminal(
    run: Path, given: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", given)
    assert terminal_width() == width
    assert max(map(len, comparison_lines(load_runs([run]), terminal_width()))) <= width


def test_the_command_does_not_import_torch(run: Path) -> None:
    """The command is registered and does not import torch."""
    code = "import sys; from dmoe.cli import main\nsys.argv = ['dmoe', 'compare', sys.argv[1]]\n"
    code += "code = main.dispatch_command(); print(code, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "0 False"
