"""The checks of benchmarks/gpu_check: on a GPU as tests, on the CPU as the script runs them.

On a machine without the plugins of pytest that pyproject.toml names:
`python -m pytest -o addopts= -m gpu tests/gpu`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import table
from benchmarks.gpu_check.checks import Found, Machine, limited
from benchmarks.gpu_check.table import CHECKS, Listed, run_checks

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
@pytest.mark.parametrize("name", CHECKS)
def test_one_gpu(name: str, tmp_path: Path) -> None:
    rows = list(run_checks(Machine("cuda", False, tmp_path), [name], float("inf")))
    assert not [row for row in rows if row.ok is False]


@pytest.mark.slow
def test_the_script_runs_on_the_cpu_all_that_needs_no_gpu(tmp_path: Path) -> None:
    """So that it cannot rot until the day there is a GPU. About 40 s on two idle cores."""
    report = tmp_path / "report.json"
    done = subprocess.run(
        ["benchmarks/gpu_check.sh", "all", "--dry-run", "--json", str(report)],
        cwd=ROOT,
        env=os.environ
        | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads(report.read_text(encoding="utf-8"))["rows"]
    run = {row["check"] for row in rows if row["ok"]}
    needs_gpu = {name for name, listed in CHECKS.items() if listed.needs_gpu}
    assert run == set(CHECKS) - needs_gpu - {"speed"}
    assert {row["check"] for row in rows if row["got"] == "not run"} == needs_gpu
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok ", "-  "))]
    assert len(lines) == len(rows), done.stdout


@pytest.fixture
def two_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(machine: Machine) -> Found:
        yield limited("of a number", float("nan"), 1e-3)
        yield "of a word", "left", "right", False

    def broken(machine: Machine) -> Found:
        yield "before", 1, "1", True
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    checks = {"wrong": Listed("first", wrong), "broken": Listed("second", broken)}
    monkeypatch.setattr(table, "CHECKS", checks)
    monkeypatch.setattr(command, "CHECKS", checks)


@pytest.mark.usefixtures("two_checks")
def test_a_check_that_fails_or_raises_is_a_line_and_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One check that raises does not hide the others; after the deadline the rest is named."""
    report = tmp_path / "report.json"
    threads = torch.get_num_threads()
    arguments = ["gpu_check", "all", "--dry-run", "--json", str(report)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        command.main()
    torch.set_num_threads(threads)
    assert ended.value.code == 1
    said = json.loads(report.read_text(encoding="utf-8"))
    rows = {
        (row["check"], row["name"]): row["ok"] for row in said["rows"] if row["name"] != "seconds"
    }
    assert rows == {
        ("wrong", "of a number"): False,
        ("wrong", "of a word"): False,
        ("broken", "before"): True,
        ("broken", "raised"): False,
    }
    assert said["failed"] == 3
    assert capsys.readouterr().out.count("FAILED") == 3
    late = list(run_checks(Machine("cpu", True, tmp_path), ["wrong"], 0.0))
    assert [(row.got, row.ok) for row in late] == [("not run: out of time", None)]


def test_without_a_gpu_the_script_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", "first"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no GPU is visible; --dry-run runs what a CPU can"):
        command.main()
    assert not list(tmp_path.iterdir())
