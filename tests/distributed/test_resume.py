"""A run of four ranks with EP = 4 resumes on one process, or on two ranks with EP = 2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dmoe.config.schedule import learning_rate
from dmoe.config.schema import Config
from dmoe.data import open_data
from dmoe.distributed.init import init_distributed
from dmoe.runs.directory import RunDir
from dmoe.train.checkpointer import Checkpointer
from dmoe.train.engine import build_engine
from dmoe.train.step import train_step, training_batches
from dmoe.train.step_guard import StepGuard
from dmoe.verify.capture import Capture, state_arrays
from tests.ranks import run_ranks
from tests.tiny import tiny

pytestmark = pytest.mark.ranks

STEPS = 3


def train_and_save(
    rank: int, world: int, config: Config, folder: Path
) -> tuple[Capture, list[float]]:
    """Train three steps, save, train two: return the saved state and the later losses."""
    return run_part(config, folder, resume=False)


def resume(rank: int, world: int, config: Config, folder: Path) -> tuple[Capture, list[float]]:
    return run_part(config, folder, resume=True)


def run_part(config: Config, folder: Path, resume: bool) -> tuple[Capture, list[float]]:
    process, data, run = (
        init_distributed("cpu"),
        open_data(config.data, config.train.seed),
        RunDir(folder),
    )
    engine = build_engine(config, process, data.tokenizer.vocab_size)
    checkpoints = Checkpointer(engine, data, run, StepGuard(config.guard))

    def step(number: int) -> float:
        rate = learning_rate(number, config.train.steps, config.optim)
        return train_step(
            engine, training_batches(data.train, engine, number), rate
        ).totals.loss_sum

    if resume:
        assert checkpoints.resume() == STEPS
    else:
        for number in range(STEPS):
            step(number)
        checkpoints.save(STEPS)
    return state_arrays(engine), [step(number) for number in (STEPS, STEPS + 1)]


@pytest.mark.parametrize("ep", [2, 4])
def test_resume_on_the_same_mesh_is_bit_identical(tmp_path: Path, ep: int) -> None:
    """DDP rebuilds its buckets after the first backward, which changed rounding after a resume.

    Two ranks do not show it (a sum of two has one order); four do.
    """
    config = tiny("moe.capacity.factor=1.25", f"parallel.ep={ep}")
    _, unbroken = run_ranks(4, train_and_save, config, tmp_path)[0]
    for _, losses in run_ranks(4, resume, config, tmp_path):
        assert losses == unbroken


@pytest.mark.parametrize(("world", "ep", "virtual"), [(1, 1, 4), (2, 2, 2)])
def test_every_expert_and_moment_is_found_by_its_global_id(
    tmp_path: Path, world: int, ep: int, virtual: int
) -> None:
    settings = ["moe.capacity.factor=1.25", "moe.balance.bias=0.01"]
    saved, unbroken = run_ranks(4, train_and_save, tiny(*settings, "parallel.ep=4"), tmp_path)[0]
    there = run_ranks(
        world,
        resume,
        tiny(*settings, f"parallel.ep={ep}", f"parallel.virtual_ranks={virtual}"),
        tmp_path,
    )
    for loaded, losses in there:
        assert loaded.keys() == saved.keys()
        for name, array in saved.items():
            assert np.array_equal(loaded[name], array), name
        assert losses == pytest.approx(unbroken, rel=1e-6)
    assert any(
        ".experts." in name and name.startswith("exp_avg_sq") and array.any()
        for name, array in saved.items()
    )
