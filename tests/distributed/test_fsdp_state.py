"""`parallel.mode: fsdp` between steps: checkpoints across modes, evaluation, generation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from dmoe.config.schema import Config
from dmoe.data import open_data
from dmoe.distributed.expert_parallel import expert_parameters
from dmoe.distributed.full_tensors import gather_full
from dmoe.distributed.init import init_distributed
from dmoe.models.generate import generate
from dmoe.runs.directory import RunDir
from dmoe.train.checkpointer import Checkpointer
from dmoe.train.engine import Engine, build_engine
from dmoe.train.evaluation import evaluate
from dmoe.train.step import train_step, training_batches
from dmoe.train.step_guard import StepGuard
from tests.ranks import run_ranks
from tests.tiny import tiny

pytestmark = pytest.mark.ranks

Arrays = dict[str, np.ndarray]
FSDP = "parallel.mode=fsdp"


def load_and_train(
    rank: int, world: int, config: Config, source: Path | None, steps: int, target: Path | None
) -> tuple[Arrays, Arrays]:
    """Return the state loaded from `source`, and the one after `steps` steps, saved at `target`."""
    process, data = init_distributed("cpu"), open_data(config.data, config.train.seed)
    engine = build_engine(config, process, data.tokenizer.vocab_size, torch.float64)
    first = (
        0
        if source is None
        else Checkpointer(engine, data, RunDir(source), StepGuard(config.guard)).resume()
    )
    loaded = state(engine)
    for step in range(first, first + steps):
        train_step(engine, training_batches(data.train, engine, step), 1e-3)
    if target is not None:
        Checkpointer(engine, data, RunDir(target), StepGuard(config.guard)).save(first + steps)
    return loaded, state(engine)


def state(engine: Engine) -> Arrays:
    """Collect full weights and moments from the parameters, without `state_dict.py`."""
    named, experts = dict(engine.model.named_parameters()), set(expert_parameters(engine.model))
    values = {name: parameter.detach() for name, parameter in named.items()}
    found = {
        name: value.numpy().copy()
        for name, value in gather_full(values, experts, engine.mesh).items()
    }
    for moment in ("exp_avg", "exp_avg_sq", "step"):
        values = {
            n: engine.optimizer.state[p][moment]
            for n, p in named.items()
            if moment in engine.optimizer.state.get(p, {})
        }
        whole = gather_full(values, set() if moment == "step" else experts, engine.mesh)
        found |= {f"{moment}.{name}": value.numpy().copy() for name, value in whole.items()}
    return found


def assert_same(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(found[name], value), (
            f"{name} differs by {np.abs(found[name] - value).max():.1e}"
        )


SETTINGS = ("train.global_batch=12", "moe.expert_dim=20", "model.tie_embeddings=false")


def test_a_checkpoint_loads_in_other_modes_and_worlds(tmp_path: Path) -> None:
    """ddp (2, EP 2) -> fsdp (4, EP 2) -> ddp (1), fsdp (4, EP 4), fsdp (3, EP 1): bit for bit."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        RunDir(folder).checkpoints.mkdir(parents=True)
    _, written = run_ranks(2, load_and_train, tiny(*SETTINGS, "parallel.ep=2"), None, 2, first)[0]
    assert any(name.startswith("exp_avg_sq.") and "experts" in name for name in written)

    loaded, further = run_ranks(
        4, load_and_train, tiny(*SETTINGS, FSDP, "parallel.ep=2"), first, 1, second
    )[3]
    assert_same(loaded, written)
    _, unbroken = run_ranks(
        1, load_and_train, tiny(*SETTINGS, "parallel.virtual_ranks=4"), first, 1, None
    )[0]
    for name, value in unbroken.items():
        assert np.linalg.norm(further[name] - value) <= 1e-10 * np.linalg.norm(value), name

    for world, ep, mode in ((1, 1, "ddp"), (4, 4, "fsdp"), (3, 1, "fsdp")):
        config = tiny(*SETTINGS, f"parallel.mode={mode}", f"parallel.ep={ep}")
        loaded, _ = run_ranks(world, load_and_train, config, second, 0, None)[world - 1]
        assert_same(loaded, further)


@dataclass
class Seen:
    losses: list[float]
    texts: list[list[int]]
    plain: list[str]
    """Parameters that are not DTensors after an evaluation and a generation."""


def between_steps(rank: int, world: int, config: Config) -> Seen:
    """Evaluate and generate before any step, train, evaluate and generate, train, evaluate."""
    process, data = init_distributed("cpu"), open_data(config.data, config.train.seed)
    engine = build_engine(config, process, data.tokenizer.vocab_size, torch.float64)
    seen = Seen([], [], [])
    for step in range(3):
        seen.losses.append(evaluate(engine, data).loss)
        seen.texts.append(generate(engine.model, [5, 7], 4, window=16, seed=step))
        seen.plain = [
            name
            for name, parameter in engine.model.named_parameters()
            if not isinstance(parameter, DTensor)
        ]
        train_step(engine, training_batches(data.train, engine, step), 1e-2)
    return seen


@pytest.mark.parametrize("recompute", ["true", "false"])
def test_evaluation_and_generation_between_steps(recompute: str) -> None:
    settings = (
        "moe.capacity.factor=1.25",
        "moe.capacity.group=sequence",
        f"train.recompute={recompute}",
    )
    (alone,) = run_ranks(1, between_steps, tiny(*settings, "parallel.virtual_ranks=4"))
    for rank in run_ranks(4, between_steps, tiny(*settings, FSDP, "parallel.ep=2")):
        assert rank.losses == pytest.approx(alone.losses, rel=1e-10)
        assert rank.texts == alone.texts
        assert rank.plain == [], (
            "still gathered after an evaluation: optimizer and checkpoint hold other tensors"
        )
