"""The systems the project grew from: each file loads, says what it shows, and trains on one process and on two ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dmoe.config.check import check
from dmoe.config.load import load
from dmoe.config.schema import Config
from dmoe.data import open_data
from dmoe.distributed import world as worlds
from dmoe.training import engine as engines
from dmoe.training.batches import training_batches
from dmoe.training.explanation import explain
from dmoe.training.step import train_step
from tests.ranks import run_ranks

SEEDS = Path(__file__).parents[1] / "configs" / "seeds"
NAMES = ("budget", "zero_cost")


def short(name: str) -> Config:
    """The file with a small batch of synthetic text: what is tested is that it runs, not what it learns."""
    config = load(SEEDS / f"{name}.yaml")
    return replace(
        config,
        data=replace(config.data, source="synthetic:zipf", seq_len=32),
        train=replace(config.train, global_batch=4, device="cpu", precision="fp32"),
    )


def losses(rank: int, world: int, config: Config) -> list[tuple[float, list[int]]]:
    engine = engines.build(config, worlds.start("cpu"), 256)
    data, found = open_data(config.data, config.train.seed), []
    for step in range(3):
        totals = train_step(engine, training_batches(data.train, engine, step), 0.004).totals
        found.append((totals.loss_sum, totals.layers[0].choices))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_shows(name: str) -> None:
    header = (SEEDS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    for words in ("# What it shows", "# What it needs", "# What to expect"):
        assert any(line.startswith(words) for line in header), words
    for world in (1, 2):
        check(load(SEEDS / f"{name}.yaml"), world)


@pytest.mark.parametrize("name", NAMES)
def test_trains_alike_on_one_process_and_two_ranks(name: str) -> None:
    alone = run_ranks(1, losses, replace(short(name), parallel=replace(short(name).parallel, virtual_ranks=2)))[0]
    for rank in run_ranks(2, losses, short(name)):
        assert [loss for loss, _ in rank] == pytest.approx([loss for loss, _ in alone], rel=1e-4)
        assert len(rank[0][1]) == {"budget": 5, "zero_cost": 12}[name]
    assert alone[2][0] < alone[0][0]


def test_explain_tells_cost_and_placement() -> None:
    sections = {section.key: section for section in explain(load(SEEDS / "budget.yaml"), 2)}
    numbers, words = sections["experts"].numbers, " ".join(sections["experts"].words)
    assert sorted(e for owner in numbers["owners"] for e in owner["experts"]) == [0, 1, 2, 3, 4]
    assert sum(owner["expected_work"] for owner in numbers["owners"]) == pytest.approx(1.0)
    assert "Cost of a row" in words
    assert "3 (192)" in words
    assert "budget of 0.5" in " ".join(sections["routing"].words)
    words = " ".join(next(s for s in explain(load(SEEDS / "zero_cost.yaml"), 2) if s.key == "experts").words)
    assert "8 zero, 9 copy, 10 constant, 11 constant" in words
