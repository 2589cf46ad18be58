"""Runs that several tests look at, each trained once."""

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
    path: Path
    stdout: str
    arguments: tuple[str, ...]
    """What it was started with, without the run directory."""


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory all commands are called in; holds a corpus of four files."""
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
    """Six steps in one process, with both trackers."""
    path = place / "alone"
    result = dmoe(
        "train", *small, f"train.run_dir={path}", "tracking.trackers=[tensorboard,wandb]", cwd=place
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return Run(path, result.stdout, small)


@pytest.fixture(scope="session")
def pair(place: Path, small: tuple[str, ...]) -> Run:
    """The same on two local ranks that share the experts, in the directory dmoe chooses."""
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
    """A copy of `run` as it was after step 3, taken up again in one process."""
    path = run.path.parent / name
    shutil.copytree(run.path, path)
    shutil.rmtree(path / "checkpoints" / "step-00000006")
    result = dmoe("train", *run.arguments, f"train.run_dir={path}", cwd=path.parent)
    assert result.returncode == 0, result.stderr[-3000:]
    return Run(path, result.stdout, run.arguments)


@pytest.fixture(scope="session")
def alone_again(alone: Run) -> Run:
    return resumed(alone, "alone-again")


@pytest.fixture(scope="session")
def pair_alone(pair: Run) -> Run:
    """What two ranks began, one process finishes."""
    return resumed(pair, "pair-alone")
