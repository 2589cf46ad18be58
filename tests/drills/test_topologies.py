"""Fault 23: a checkpoint of four ranks with EP = 4 is resumed at other sizes and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from dmoe.config.schema import Config
from dmoe.data import open_data
from dmoe.distributed import init as worlds
from dmoe.runs.directory import RunDir
from dmoe.train import engine as engines
from dmoe.train.checkpointer import Checkpointer
from dmoe.train.step import train_step, training_batches
from dmoe.train.step_guard import StepGuard
from dmoe.verify.capture import Capture, state_arrays
from tests.drills.driver import digest
from tests.drills.worker import run_ranks
from tests.tiny import tiny

pytestmark = pytest.mark.drills

STEPS, RATE = 3, 1e-2
SETTINGS = (
    "moe.capacity.factor=1.25",
    "moe.capacity.group=sequence",
    "moe.balance.switch_level=sequence",
    "moe.balance.bias=0.01",
)
"""No setting depends on the number of token groups, which eight ranks cannot keep."""


@dataclass
class RankResult:
    """State, loss and samples of one rank."""

    state: Capture
    """Full weights, moments, step counts and biases by name; experts by global id."""
    loss: float
    """Loss of the next step."""
    samples: dict[int, str]
    """Hash of this rank's samples by place in the global batch."""


def resume_and_step(
    rank: int, world: int, config: Config, source: Path | None, target: Path
) -> RankResult:
    """Resume `source` (or train `STEPS` steps), save to `target`, and do the next step."""
    here, data = worlds.init_distributed("cpu"), open_data(config.data, config.train.seed)
    engine = engines.build_engine(config, here, data.tokenizer.vocab_size)
    if source is None:
        for step in range(STEPS):
            train_step(engine, training_batches(data.train, engine, step), RATE)
    else:
        assert Checkpointer(engine, data, RunDir(source), StepGuard(config.guard)).resume() == STEPS
    state = state_arrays(engine)
    Checkpointer(engine, data, RunDir(target), StepGuard(config.guard)).save(STEPS)
    batches = training_batches(data.train, engine, STEPS)
    samples = {
        batch.first_sequence + i: digest(row)
        for batch in batches
        for i, row in enumerate(batch.input.numpy())
    }
    return RankResult(state, train_step(engine, batches, RATE).totals.loss_sum, samples)


def on_four_ranks(source: Path | None, target: Path) -> list[RankResult]:
    return run_ranks(4, resume_and_step, tiny(*SETTINGS, "parallel.ep=4"), source, target)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[RankResult]]:
    folder = tmp_path_factory.mktemp("four") / "run"
    return folder, on_four_ranks(None, folder)


def assert_equal(found: list[RankResult], expected: list[RankResult]) -> None:
    """Assert equal state bit for bit, equal samples in their places, equal loss up to rounding."""
    for result in found:
        assert result.state.keys() == expected[0].state.keys()
        for name, array in expected[0].state.items():
            assert np.array_equal(result.state[name], array), name
        assert result.loss == pytest.approx(expected[0].loss, rel=1e-6)
    assert all_samples(found) == all_samples(expected)


def all_samples(parts: list[RankResult]) -> list[tuple[int, str]]:
    return sorted(item for result in parts for item in result.samples.items())


@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 2), (4, 2), (8, 8)])
def test_there_and_back(
    world: int, ep: int, written: tuple[Path, list[RankResult]], tmp_path: Path
) -> None:
    folder, expected = written
    other = run_ranks(
        world, resume_and_step, tiny(*SETTINGS, f"parallel.ep={ep}"), folder, tmp_path / "other"
    )
    assert_equal(other, expected)
    back = on_four_ranks(tmp_path / "other", tmp_path / "back")
    assert_equal(back, expected)
    assert [result.loss.hex() for result in back] == [result.loss.hex() for result in expected], (
        "the same ranks again: to the bit"
    )


def test_the_compared_state_is_not_trivial(written: tuple[Path, list[RankResult]]) -> None:
    """Experts, moments and samples differ from each other; some bias is not zero."""
    _, (first, *_) = written
    _, parts = written
    experts = [
        (name, array)
        for name, array in first.state.items()
        if ".experts." in name and not name.startswith("step")
    ]
    assert {name.split(".")[0] for name, _ in experts} == {"model", "exp_avg", "exp_avg_sq"}
    for name, array in experts:
        assert len(array) == 8
        assert len({expert.tobytes() for expert in array}) == 8, name
    places = all_samples(parts)
    assert [place for place, _ in places] == list(range(8))
    assert len({sample for _, sample in places}) == 8
    assert any(name.startswith("buffer.") and array.any() for name, array in first.state.items())
