"""What a run will do although its config seems to say otherwise is said when it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmoe.observability.display.state import event_text
from dmoe.report import write_report
from tests.cli.commands import SMALL, metrics, run_in_process

ARGUMENTS = ("train", *SMALL, "train.run_dir=run")
ZIPF = "data.source=synthetic:zipf"


def notes(tmp_path: Path, *overrides: str) -> list[str]:
    """Train, and return the notes of this start."""
    run = run_in_process(*ARGUMENTS, *overrides, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    lines = metrics(tmp_path / "run")
    start = max(i for i, line in enumerate(lines) if line["event"] in ("start", "restart"))
    first = max([0, *(i for i, line in enumerate(lines[:start]) if line["event"] == "end")])
    texts = [line["text"] for line in lines[first:start] if line["event"] == "alert"]
    for text in texts:
        assert f"note: {text}" in run.stdout
    assert ("resumed" in run.stdout) == (lines[start]["resumed_from"] > 0)
    return texts


def test_a_run_that_is_prolonged_and_one_that_is_finished(tmp_path: Path) -> None:
    """`train.steps` made larger began with an twelve times larger learning rate, and the same command
    on a finished run evaluated once more; both without a word."""
    assert notes(tmp_path, ZIPF) == []
    (note,) = notes(tmp_path, ZIPF)
    assert note.startswith("train.steps=6: the run has done all of them, so nothing is trained")
    (note,) = notes(tmp_path, ZIPF, "train.steps=12")
    assert note.startswith("train.steps=12: the learning rate of step 7 is 0.00243")
    assert "not 0.0002 as before; optim.schedule=constant" in note


def test_a_run_that_is_prolonged_as_the_note_says(tmp_path: Path) -> None:
    assert notes(tmp_path, ZIPF) == []
    command = ("optim.schedule=constant", "optim.warmup=0", "optim.lr=0.0002")
    assert notes(tmp_path, ZIPF, "train.steps=8", *command) == []
    assert {line["lr"] for line in metrics(tmp_path / "run") if line["event"] == "train"} >= {2e-4}


def test_a_warm_up_that_is_longer_than_the_run(tmp_path: Path) -> None:
    (note,) = notes(tmp_path, ZIPF, "optim.warmup=50")
    assert note.startswith("optim.warmup=50: the run has 6 steps, so the learning rate rises to ")
    last = [line["lr"] for line in metrics(tmp_path / "run") if line["event"] == "train"][-1]
    assert f"to {last:g}, and never reaches optim.lr=0.004" in note


@pytest.mark.parametrize(
    ("overrides", "count", "unit"),
    [
        (["data.source=a.txt", "data.holdout=0.5"], 6, "sequences"),
        (
            ["train.task=classification", "data.source=sklearn:wine", "data.seq_len=128"],
            None,
            "samples",
        ),
    ],
)
def test_a_batch_that_is_larger_than_the_corpus(
    overrides: list[str], count: int | None, unit: str, tmp_path: Path
) -> None:
    """A step then reads every sequence several times, and nothing said so."""
    (tmp_path / "a.txt").write_text("The router sends tokens to experts. " * 6)
    batch = 8 if count else 400
    (note,) = notes(tmp_path, *overrides, f"train.global_batch={batch}", "train.sample_tokens=0")
    assert note.startswith(f"train.global_batch={batch}: there are {count or ''}")
    assert f" training {unit}, so a step reads each of them " in note


def test_a_fresh_run_was_not_resumed(tmp_path: Path) -> None:
    """The report of a run that had only begun said "resumed from 0; attempt 0"."""
    assert notes(tmp_path, ZIPF) == []
    write_report([tmp_path / "run"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "resumed from" not in page
    assert "attempt 0" not in page


def test_a_restart_without_a_checkpoint_starts_again() -> None:
    """`dmoe watch` said that it "was resumed after step 0"."""
    assert event_text("restart", 0, {"resumed_from": 0}) == (
        "the run has started again from the beginning"
    )
    assert event_text("restart", 3, {}) == "the run was resumed after step 3"
