"""`dmoe train --quiet`: notes, alerts, and the run directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.commands import SMALL, dmoe, metrics
from tests.cli.terminal import Terminal

pytestmark = pytest.mark.ranks

ARGUMENTS = (*SMALL, "data.source=synthetic:zipf", "train.run_dir=run")


@pytest.mark.parametrize("ranks", [(), ("--ranks", "2")], ids=["one rank", "two ranks"])
def test_quiet_prints_only_notes_alerts_and_run_directory(
    tmp_path: Path, ranks: tuple[str, ...]
) -> None:
    result = dmoe("train", "--quiet", *ARGUMENTS, *ranks, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    *remarks, last = result.stdout.splitlines()
    assert last == "run directory: run"
    assert all(line.startswith(("note: ", "alert: ")) for line in remarks), remarks
    assert len(remarks) == sum(line["event"] == "alert" for line in metrics(tmp_path / "run"))


def test_quiet_prints_alerts(tmp_path: Path) -> None:
    """With capacity for a quarter of the choices, most are dropped."""
    result = dmoe("train", "--quiet", *ARGUMENTS, "moe.capacity.factor=0.25", cwd=tmp_path)
    assert any(
        line.startswith("alert: ") and "dropped" in line for line in result.stdout.splitlines()
    ), result.stdout


def test_quiet_shows_no_panel(tmp_path: Path) -> None:
    with Terminal("train", "--quiet", *ARGUMENTS, cwd=tmp_path) as terminal:
        assert terminal.finish() == 0
        assert "run directory: run" in terminal.text
        assert b"\x1b" not in terminal.raw
