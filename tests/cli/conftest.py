"""Runs that several tests share, each trained once."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.commands import SMALL, dmoe, launched

TEXT = "".join(
    f"def step_{number}(x):\n    return x * {number} + {number * number}\n\n"
    for number in range(200)
)


@dataclass(frozen=True)
class Run:
    """Finished run."""

    path: Path
    stdout: str
    arguments: tuple[str, ...]
    """Overrides, without the run directory."""


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working directory of all commands, with a corpus of four files."""
    place = tmp_path_factory.mktemp("cli")
    (place / "corpus").mkdir()
    for number in range(4):
        (place / "corpus" / f"{number}.py").write_text(f"# file {number}\n{TEXT}", encoding="utf-8")
    return place


@pytest.fixture(scope="session")
def small(place: Path) -> tuple[str, ...]:
    return (*SMALL, f"data.source={place / 'corpus'}", "data.holdout=0.3")


@pytest.fixture(scope="session")
def alone(place: Path, small: tuple[str, ...]) -> Run:
    """Train six steps in one process, with both trackers."""
    path = place / "alone"
    result = dmoe(
        "train", *small, f"train.run_dir={path}", "tracking.trackers=[tensorboard,wandb]", cwd=place
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return Run(path, result.stdout, small)


@pytest.fixture(scope="session")
def pair(place: Path, small: tuple[str, ...]) -> Run:
    """Train on two local ranks with expert parallelism, in the default run directory."""
    result = dmoe("train", *small, "--ranks", "2", cwd=place)
    assert result.returncode == 0, result.stderr[-3000:]
    return Run((place / "runs" / "latest").resolve(), result.stdout, small)


@pytest.fixture(scope="session")
def under_torchrun(place: Path, small: tuple[str, ...]) -> Run:
    path = place / "torchrun"
    result = launched("train", *small, f"train.run_dir={path}", cwd=place)
    assert result.returncode == 0, result.stderr[-3000:]
    return Run(path, result.stdout, small)


def resumed(run: Run, name: str) -> Run:
    """Resume a copy of `run` after step 3 in one process."""
    path = run.path.parent / name
    shutil.copytree(run.path, path)
    shutil.rmtree(path / "checkpoints" / "step-00000006")
    result = dmoe("train", *run.arguments, f"train.run_dir={path}", cwd=path.parent)
    assert result.returncode == 0, result.stderr[-3000:]
    return Run(path, result.stdout, run.arguments)


@pytest.fixture(scope="session")
def resumed_alone(alone: Run) -> Run:
    return resumed(alone, "resumed-alone")


@pytest.fixture(scope="session")
def pair_resumed_alone(pair: Run) -> Run:
    """Resume a run of two ranks in one process."""
    return resumed(pair, "pair-resumed-alone")
