"""A real run of two ranks that the drills damage: two shards, checkpoints of steps 4 and 8, trained once a module."""

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
from tests.drills.worker import Ending, digest_of, run_ranks, train_inside

__all__ = ["NEW", "OLD", "STEPS", "Resumer", "copied", "original", "trained"]

STEPS = ("train.steps=8", "checkpoint.every=4")
OLD, NEW = 4, 8


def trained(run: Path, *overrides: str, ranks: int = 2) -> Path:
    """A run of eight steps that went well."""
    endings = run_ranks(ranks, train_inside, run, (*STEPS, *overrides))
    assert endings == [Ending(0, "")] * ranks
    return run


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("original") / "run")


@contextmanager
def copied(run: Path, place: Path) -> Iterator[Path]:
    """A copy that may be damaged, and goes afterwards."""
    copy = shutil.copytree(run, place / "copy", symlinks=True)
    try:
        yield copy
    finally:
        shutil.rmtree(copy)


class Resumer:
    """One process with a model, that takes up a run again and again: what the trainer does at its start."""

    def __init__(self) -> None:
        config = load(None, [*DRILL, *STEPS])
        self.data = open_data(config.data, config.train.seed)
        self.engine = engines.build_engine(
            config, worlds.init_distributed("cpu"), self.data.tokenizer.vocab_size
        )

    def resume(self, run: Path) -> tuple[int, list[str]]:
        """The step that was taken up, and all warnings on the way."""
        guard = StepGuard(self.engine.config.guard)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step = Checkpointer(self.engine, self.data, RunDir(run), guard).resume()
        return step, [
            str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)
        ]

    def falls_back(self, run: Path, name: str) -> None:
        """The newest checkpoint is refused, with one warning that names `name`, before a tensor of it is used; the older one serves."""
        step, told = self.resume(run)
        assert step == OLD
        (warning,) = told
        assert warning.startswith(f"falling back to {step_name(OLD)}: ")
        assert f"{step_name(NEW)}/{name}" in warning or f"{step_name(NEW)} " in warning, warning
        assert name in warning, warning

    def refuses(self, run: Path, *words: str) -> None:
        """The only checkpoint is refused, and not one bit of the model or the optimizer has changed."""
        before = digest_of(self.engine)
        with pytest.raises(CheckpointError) as refused:
            self.resume(run)
        for word in words:
            assert word in str(refused.value)
        assert digest_of(self.engine) == before
