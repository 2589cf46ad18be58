"""A run of two ranks to be damaged: two shards, checkpoints of steps 4 and 8, once per module."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dmoe.checkpoint.manifest import step_name
from dmoe.config.errors import CheckpointError
from dmoe.config.load import load
from dmoe.data import open_data
from dmoe.distributed import init as worlds
from dmoe.runs.directory import RunDir
from dmoe.train import engine as engines
from dmoe.train.checkpointer import Checkpointer
from dmoe.train.step_guard import StepGuard
from tests.drills.jobs import DRILL
from tests.drills.worker import RankOutcome, digest_of, run_ranks, train_with_fault

__all__ = ["NEW", "OLD", "STEPS", "Resumer", "copied", "original", "trained"]

STEPS = ("train.steps=8", "checkpoint.every=4")
OLD, NEW = 4, 8


def trained(run: Path, *overrides: str, ranks: int = 2) -> Path:
    """Train eight steps without a fault."""
    endings = run_ranks(ranks, train_with_fault, run, (*STEPS, *overrides))
    assert endings == [RankOutcome(0, "")] * ranks
    return run


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("original") / "run")


@contextmanager
def copied(run: Path, place: Path) -> Iterator[Path]:
    """Copy a run to be damaged; delete the copy at the end."""
    copy = shutil.copytree(run, place / "copy", symlinks=True)
    try:
        yield copy
    finally:
        shutil.rmtree(copy)


class Resumer:
    """One process with a model that resumes runs repeatedly, as the trainer does at its start."""

    def __init__(self) -> None:
        config = load(None, [*DRILL, *STEPS])
        self.data = open_data(config.data, config.train.seed)
        self.engine = engines.build_engine(
            config, worlds.init_distributed("cpu"), self.data.tokenizer.vocab_size
        )

    def resume(self, run: Path) -> tuple[int, list[str]]:
        """Return the resumed step and all warnings."""
        guard = StepGuard(self.engine.config.guard)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step = Checkpointer(self.engine, self.data, RunDir(run), guard).resume()
        return step, [
            str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)
        ]

    def assert_falls_back(self, run: Path, name: str) -> None:
        """Assert that the older checkpoint is loaded, with one warning about the file `name`."""
        step, messages = self.resume(run)
        assert step == OLD
        (warning,) = messages
        assert warning.startswith(f"falling back to {step_name(OLD)}: ")
        assert f"{step_name(NEW)}/{name}" in warning or f"{step_name(NEW)} " in warning, warning
        assert name in warning, warning

    def assert_refuses(self, run: Path, *words: str) -> None:
        """Assert that the only checkpoint is refused and model and optimizer are unchanged."""
        before = digest_of(self.engine)
        with pytest.raises(CheckpointError) as refused:
            self.resume(run)
        for word in words:
            assert word in str(refused.value)
        assert digest_of(self.engine) == before
