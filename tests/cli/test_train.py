"""Command `dmoe train`: one process, local ranks, torchrun, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dmoe.config.load import load
from tests.cli.commands import metrics, train_lines
from tests.cli.conftest import Run

pytestmark = pytest.mark.ranks

EVENTS = [
    "start",
    *["train"] * 3,
    "checkpoint",
    "eval",
    *["train"] * 3,
    "checkpoint",
    "eval",
    "end",
]
ALWAYS = {"event", "step", "time"}
TRAIN = {
    "loss",
    "bits_per_byte",
    "aux",
    "grad_norm",
    "lr",
    "tokens",
    "tokens_per_second",
    "drop_rate",
    "load_max_over_mean",
}


def losses(run: Run) -> dict[int, float]:
    return {step: line["loss"] for step, line in train_lines(run.path).items()}


def test_metrics_have_all_events_in_order(alone: Run) -> None:
    lines = metrics(alone.path)
    assert [line["event"] for line in lines if line["event"] != "alert"] == EVENTS
    assert all(line.keys() >= ALWAYS for line in lines)
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)


def test_metrics_have_the_documented_keys(alone: Run) -> None:
    for line in train_lines(alone.path).values():
        assert line.keys() >= TRAIN
        assert line["aux"].keys() == {"switch", "z"}
    assert [line["tokens"] for line in train_lines(alone.path).values()] == [
        128 * step for step in range(1, 7)
    ]
    for line in (line for line in metrics(alone.path) if line["event"] == "eval"):
        assert line.keys() >= {"loss", "bits_per_byte", "split"}


def test_it_learns_and_reports_dropped_tokens(alone: Run) -> None:
    assert losses(alone)[6] < losses(alone)[1]
    assert all(0 < line["drop_rate"] < 1 for line in train_lines(alone.path).values())


def test_files_of_the_run_directory(alone: Run) -> None:
    assert {path.name for path in alone.path.iterdir()} >= {
        "config.yaml",
        "resolved.yaml",
        "metrics.jsonl",
        "checkpoints",
        "logs",
    }
    given = (alone.path / "config.yaml").read_text(encoding="utf-8")
    assert all(f"# override: {argument}\n" in given for argument in alone.arguments)
    resolved = load(alone.path / "resolved.yaml")
    assert resolved == load(
        None,
        [*alone.arguments, f"train.run_dir={alone.path}", "tracking.trackers=[tensorboard,wandb]"],
    )
    checkpoints = sorted(path.name for path in (alone.path / "checkpoints").iterdir())
    assert checkpoints == ["step-00000003", "step-00000006"]
    kinds = {path.suffix for path in (alone.path / "checkpoints").rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors"}


def test_the_output_has_the_main_facts(alone: Run) -> None:
    for words in ("parameters", "run directory: alone", "step 6/6", "bits/byte", "sample:\ndef "):
        assert words in alone.stdout


def test_tensorboard_reads_back_what_was_logged(alone: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = list((alone.path / "logs").rglob("events.out.tfevents*"))
    recorded: dict[str, dict[int, float]] = {}
    for folder in {path.parent for path in files}:
        events = EventAccumulator(str(folder)).Reload()
        recorded |= {
            tag: {event.step: event.value for event in events.Scalars(tag)}
            for tag in events.Tags()["scalars"]
        }
    for key in ("loss", "grad_norm", "lr", "drop_rate"):
        logged = {step: line[key] for step, line in train_lines(alone.path).items()}
        assert recorded[f"train/{key}"] == pytest.approx(logged, rel=1e-6)
    assert recorded["eval/bits_per_byte"].keys() == {3, 6}


def test_wandb_keeps_the_run_offline(alone: Run) -> None:
    files = list((alone.path / "logs").rglob("run-*.wandb"))
    assert len(files) == 1
    assert "offline-run" in str(files[0])
    assert b"train/loss" in files[0].read_bytes()


def test_two_ranks_train_in_a_directory_of_their_own(pair: Run, place: Path) -> None:
    assert pair.path.parent == (place / "runs").resolve()
    start = metrics(pair.path)[0]
    assert (start["event"], start["world"], start["ep"]) == ("start", 2, 2)
    assert [line["event"] for line in metrics(pair.path) if line["event"] != "alert"] == EVENTS
    assert pair.stdout.count("run directory: runs/") == 2, (
        "printed at the start and at the end, by one rank"
    )


def test_torchrun_gives_the_same_numbers_as_ranks(pair: Run, under_torchrun: Run) -> None:
    assert losses(under_torchrun) == losses(pair)
    assert final(under_torchrun.path) == final(pair.path)


def test_a_resumed_run_equals_the_uninterrupted_one(alone: Run, resumed_alone: Run) -> None:
    lines = metrics(resumed_alone.path)
    restart = next(index for index, line in enumerate(lines) if line["event"] == "restart")
    assert lines[restart]["step"] == 3
    again = {line["step"]: line for line in lines[restart:] if line["event"] == "train"}
    assert list(again) == [4, 5, 6]
    for step, line in again.items():
        before = train_lines(alone.path)[step]
        assert {key: line[key] for key in TRAIN - {"tokens_per_second"}} == {
            key: before[key] for key in TRAIN - {"tokens_per_second"}
        }
    assert final(resumed_alone.path) == final(alone.path)
    assert "resumed after step 3" in resumed_alone.stdout


def test_one_process_continues_a_run_of_two_ranks(pair: Run, pair_resumed_alone: Run) -> None:
    lines = metrics(pair_resumed_alone.path)
    restart = next(index for index, line in enumerate(lines) if line["event"] == "restart")
    assert (lines[restart]["step"], lines[restart]["world"]) == (3, 1)
    again = {line["step"]: line["loss"] for line in lines[restart:] if line["event"] == "train"}
    assert list(again) == [4, 5, 6]
    assert again[4] == pytest.approx(losses(pair)[4], rel=1e-3), (
        "the first loss comes from the loaded weights"
    )


def final(run: Path) -> dict[str, Any]:
    line = metrics(run)[-1]
    assert line["event"] == "end"
    return {key: value for key, value in line.items() if key != "time"}
