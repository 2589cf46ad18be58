"""TensorBoard and wandb have each step once after kills and resumes, read with their own types.

Starts of wandb take seconds: the slow tier has most of these tests.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dmoe.config.load import load
from dmoe.observability.trackers import MAX_FIGURES, Trackers
from dmoe.runs.directory import RunDir
from dmoe.runs.metrics_log import read_metrics
from tests.cli.commands import environment
from tests.observability.wandb_file import read_rows

RUN = """
import os, sys
from pathlib import Path
from accelerate import Accelerator
from dmoe.config.load import load
from dmoe.runs.metrics_log import MetricsFile
from dmoe.runs.directory import RunDir
from dmoe.observability.trackers import Trackers

mode, first, last, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
run = RunDir(Path("run").resolve())
run.create(None)
metrics = MetricsFile(run.metrics)
config = load(None, ["tracking.trackers=[wandb,tensorboard]", f"tracking.wandb_mode={mode}"])
trackers = Trackers(Accelerator(cpu=True), config, run, first_step=first, notify=lambda text: print("note:", text))
metrics.write("restart" if first else "start", first, {"resumed_from": first})

def steps(first, last, factor):
    for step in range(first + 1, last + 1):
        values = {"loss": factor / step, "layers": [{"drop_rate": 0.5}]}
        metrics.write("train", step, values)
        trackers.log(values, step)
        if step % 2 == 0:
            metrics.write("eval", step, {"loss": 10.0 * step})
            trackers.log({"loss": 10.0 * step}, step, "eval")

steps(first, last, 1.0 + first)
if end == "kill":
    os.kill(os.getpid(), 9)
if end == "rewind":
    metrics.write("rollback", first + 1, {"resumed_from": first + 1})
    trackers.rollback(first + 1)
    steps(first + 1, last, 7.0)
if end == "break":
    broken = trackers.accelerator.trackers[0]
    broken.run = None
    steps(last, last + 2, 1.0)
trackers.alert("note", "hello")
trackers.close()
"""


def train(folder: Path, mode: str, first: int, last: int, end: str = "close", **env: str) -> str:
    inherited = {
        name: value for name, value in environment().items() if not name.startswith("WANDB")
    }
    command = [sys.executable, "-c", RUN, mode, str(first), str(last), end]
    own = {"HOME": str(folder), "NETRC": str(folder / "netrc")}
    result = subprocess.run(
        command,
        cwd=folder,
        env=inherited | own | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == (-9 if end == "kill" else 0), result.stderr[-3000:]
    return result.stdout


def in_wandb(folder: Path, key: str = "train/loss") -> list[tuple[int, float]]:
    return [(row["_step"], row[key]) for row in read_rows(folder / "run/logs/wandb") if key in row]


def in_tensorboard(folder: Path, key: str = "train/loss") -> list[tuple[int, float]]:
    events = EventAccumulator(
        str(folder / "run/logs/tensorboard"), size_guidance={"scalars": 0}
    ).Reload()
    return [(event.step, event.value) for event in events.Scalars(key)]


def in_metrics(folder: Path, event: str = "train") -> list[tuple[int, float]]:
    return [
        (line["step"], line["loss"])
        for line in read_metrics(folder / "run/metrics.jsonl")
        if line["event"] == event
    ]


def assert_each_step_once(folder: Path, steps: int) -> None:
    for event in ("train", "eval"):
        expected = in_metrics(folder, event)
        assert [step for step, _ in expected] == [
            step for step in range(1, steps + 1) if event == "train" or step % 2 == 0
        ]
        approximate = [(step, pytest.approx(value)) for step, value in expected]
        assert in_wandb(folder, f"{event}/loss") == approximate
        assert in_tensorboard(folder, f"{event}/loss") == approximate


@pytest.mark.slow
@pytest.mark.parametrize("end", ["close", "kill"])
def test_resumed_run_has_each_step_once(end: str, tmp_path: Path) -> None:
    """wandb drops rows below its newest, and loses logged rows when killed.

    Both times the curve had a gap, or two values for one step.
    """
    train(tmp_path, "offline", 0, 6, end)
    name = (tmp_path / "run/logs/wandb-run-id").read_text(encoding="utf-8")
    assert train(tmp_path, "offline", 3, 8, end) == ""
    assert train(tmp_path, "offline", 5, 9) == ""
    assert_each_step_once(tmp_path, 9)
    assert (tmp_path / "run/logs/wandb-run-id").read_text(encoding="utf-8") == name
    assert len(list((tmp_path / "run/logs/wandb").glob(f"offline-run-*-{name.strip()}"))) == 1, (
        "wandb sync finds one directory"
    )


@pytest.mark.slow
def test_rollback_in_the_same_process(tmp_path: Path) -> None:
    assert train(tmp_path, "offline", 0, 5, "rewind") == ""
    assert_each_step_once(tmp_path, 5)
    assert in_metrics(tmp_path)[1][1] == pytest.approx(7.0 / 2)


def test_figures_are_limited_per_run(tmp_path: Path) -> None:
    """A fixed number of times, and once at the end if the last evaluation sent none."""
    drawn: list[int] = []
    tracker = SimpleNamespace(
        log=lambda values, step: None, log_figures=lambda history, step: drawn.append(step)
    )
    accelerator = cast(Any, SimpleNamespace(is_main_process=True))
    trackers = Trackers(accelerator, load(None, ["train.steps=1000"]), RunDir(tmp_path))
    accelerator.trackers = [tracker]
    for step in range(1, 1000):
        trackers.log({"loss": 1.0, "layers": [{"layer": 0, "load": [1, 2]}]}, step)
        trackers.log({"loss": 1.0}, step, "eval")
    assert drawn == [1000 * part // MAX_FIGURES for part in range(1, MAX_FIGURES)]
    trackers.finish(None)
    trackers.finish(None)
    assert drawn[MAX_FIGURES - 1 :] == [999]


@pytest.mark.slow
def test_uploaded_steps_are_not_sent_again(tmp_path: Path) -> None:
    """`wandb sync` writes a marker beside the file: the server has these rows, void ones too."""
    train(tmp_path, "offline", 0, 6)
    (first,) = (tmp_path / "run/logs/wandb").glob("offline-run-*")
    (file,) = first.glob("*.wandb")
    file.with_suffix(".wandb.synced").touch()
    train(tmp_path, "offline", 3, 8)
    assert first.exists()
    assert [step for step, _ in in_wandb(tmp_path)] == list(range(1, 9))


@pytest.mark.slow
def test_failing_tracker_is_removed_with_one_line(tmp_path: Path) -> None:
    printed = train(tmp_path, "offline", 0, 3, "break").splitlines()
    assert len(printed) == 1
    assert "wandb failed after step 4" in printed[0]
    assert [step for step, _ in in_tensorboard(tmp_path)] == [1, 2, 3, 4, 5]


def test_disabled_wandb_writes_nothing(tmp_path: Path) -> None:
    assert train(tmp_path, "disabled", 0, 3) == ""
    assert sorted(path.name for path in (tmp_path / "run/logs").iterdir()) == ["tensorboard"]
    assert [step for step, _ in in_tensorboard(tmp_path)] == [1, 2, 3]


def test_wandb_records_nothing_of_the_machine(tmp_path: Path) -> None:
    """wandb records command line, repository, packages and machine by default."""
    secret = "correct-horse-battery"
    train(tmp_path, "offline", 0, 3, "close", MY_SERVICE_TOKEN=secret, WANDB_API_KEY="ab12" * 10)
    wandb = tmp_path / "run/logs/wandb"
    names = [path.name for path in wandb.rglob("*") if path.is_file()]
    assert any(name.endswith(".wandb") for name in names)
    assert {"wandb-metadata.json", "requirements.txt", "output.log", "diff.patch"}.isdisjoint(names)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert secret.encode() not in data, path
            assert b"ab12ab12" not in data, path
