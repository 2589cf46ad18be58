"""The commit of a run is that of the working directory's repository, and whether it was changed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dmoe.runs.provenance import COMMAND, describe_provenance, this_command


def git(*arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_and_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    git("init", "--quiet")
    assert "commit" not in describe_provenance(), "nothing is committed"
    file = tmp_path / "own.py"
    file.write_text("1")
    git("add", "own.py")
    git("commit", "--quiet", "-m", "first")
    found = describe_provenance()
    assert (found["commit"], found["dirty"]) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "metrics.jsonl").write_text("")
    assert describe_provenance()["dirty"] is False, "a run directory is no change"
    file.write_text("2")
    assert describe_provenance()["dirty"] is True


def test_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert "commit" not in describe_provenance()


def test_the_command_of_a_rank_is_that_of_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """`dmoe train --ranks 2` was recorded as `dmoe train`, which trains on one process."""
    monkeypatch.delenv(COMMAND, raising=False)
    assert describe_provenance()["command"] == this_command()
    monkeypatch.setenv(COMMAND, "dmoe train --ranks 2")
    assert describe_provenance()["command"] == "dmoe train --ranks 2"
