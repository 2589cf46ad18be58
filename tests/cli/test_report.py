"""Command `dmoe report`: its output file and its errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dmoe.cli.runs import report
from dmoe.config.errors import ConfigError
from tests.report.runs import line, write


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write(tmp_path / "run", [line("start", 0, world=1, ep=1), line("train", 1, loss=2.5)])


def test_the_report_of_one_run_is_in_its_directory(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report([run])
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    assert "<h1>run</h1>" in (run / "report.html").read_text(encoding="utf-8")


def test_the_report_of_several_runs_is_in_the_working_directory(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report([run, shutil.copytree(run, tmp_path / "other")])
    assert "<h1>2 runs compared</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not (run / "report.html").exists()


def test_output_option(run: Path, tmp_path: Path) -> None:
    report([run], output=tmp_path / "elsewhere.html")
    assert (tmp_path / "elsewhere.html").is_file()
    assert not (run / "report.html").exists()


def test_a_path_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run directory") as refused:
        report([tmp_path])
    assert refused.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--output=.*cannot be written \(No such file or directory\)"
    ):
        report([run], output=tmp_path / "nowhere" / "report.html")
