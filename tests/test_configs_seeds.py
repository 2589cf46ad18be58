"""configs/seeds: every file loads, has its header, and trains alike on one process and two ranks.

The compared files have the same data, batch, steps and, as far as possible, arithmetic.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from dmoe.config.expert_shapes import count_choices
from dmoe.config.load import load
from dmoe.config.rules import check
from dmoe.config.schema import Config
from dmoe.data import open_data
from dmoe.distributed import init as worlds
from dmoe.explain import explain
from dmoe.models.transformer import Transformer
from dmoe.train import engine as engines
from dmoe.train.reduction import LayerTotals
from dmoe.train.step import train_step, training_batches
from dmoe.verify.cases import prepare, shrink
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks

SEEDS = Path(__file__).parents[1] / "configs" / "seeds"
COMPARED = ("static", "top_k", "zero_cost", "budget", "deepseek_moe")
NAMES = (*COMPARED, "adaptive")
Found = dict[str, list[tuple[float, list[LayerTotals]]]]


def short(name: str) -> Config:
    """Return the config with a small batch of synthetic text."""
    config = load(SEEDS / f"{name}.yaml")
    return replace(
        config,
        data=replace(config.data, source="synthetic:zipf", seq_len=32),
        train=replace(config.train, global_batch=4, device="cpu", precision="fp32"),
    )


def three_steps(rank: int, world: int) -> Found:
    """Train three steps of every file; one process has two virtual ranks (equal token groups)."""
    found: Found = {}
    for name in NAMES:
        config = short(name)
        config = replace(config, parallel=replace(config.parallel, virtual_ranks=2 // world))
        # one process builds many engines; accelerate expects one
        AcceleratorState._reset_state(reset_partial_state=True)
        engine = engines.build_engine(config, worlds.init_distributed("cpu"), 256)
        data, found[name] = open_data(config.data, config.train.seed), []
        for step in range(3):
            totals = train_step(engine, training_batches(data.train, engine, step), 0.004).totals
            found[name].append((totals.loss_sum, totals.layers))
        engine.close()
    return found


@pytest.mark.parametrize("name", sorted(path.stem for path in SEEDS.glob("*.yaml")))
def test_the_small_config_of_verify_is_allowed(name: str) -> None:
    """Synthetic samples had two streams, so `dmoe verify` refused the file with three."""
    check(prepare(shrink(load(SEEDS / f"{name}.yaml")), 2), 1)


@pytest.fixture(scope="module")
def trained() -> tuple[Found, list[Found]]:
    return run_ranks(1, three_steps)[0], run_ranks(2, three_steps)


@pytest.mark.parametrize("path", sorted(SEEDS.glob("*.yaml")), ids=lambda path: path.stem)
def test_header_and_explain(path: Path) -> None:
    header = path.read_text(encoding="utf-8").splitlines()
    for heading in ("# What it shows", "# What it needs", "# What to expect"):
        assert any(line.startswith(heading) for line in header), heading
    for world in (1, 2):
        check(load(path), world)
        assert all(section.sentences for section in explain(load(path), world))


@pytest.mark.parametrize("name", NAMES)
def test_trains_alike_on_one_process_and_two_ranks(
    name: str, trained: tuple[Found, list[Found]]
) -> None:
    """Equal loss and load-balancing losses, also `usage_std`, a sum over the ranks."""
    alone, ranks = trained[0][name], [found[name] for found in trained[1]]
    for rank in ranks:
        assert [loss for loss, _ in rank] == pytest.approx([loss for loss, _ in alone], rel=1e-4)
        for (_, layers), (_, expected_layers) in zip(rank, alone, strict=True):
            for layer, expected in zip(layers, expected_layers, strict=True):
                assert layer.aux == pytest.approx(expected.aux, rel=1e-3)
                assert len(layer.choice_counts) == count_choices(load(SEEDS / f"{name}.yaml").moe)
    assert alone[2][0] < alone[0][0]
    assert ("usage_std" in alone[0][1][0].aux if alone[0][1] else False) == (name == "top_k")


def test_compared_files_are_comparable() -> None:
    """Data, batch, steps, optimizer and width are those of the dense baseline.

    The FLOPs of a token's feed-forward are equal too: exactly with K experts, at most with a
    budget, on average with zero-cost experts that are chosen as often as others.
    """
    static = load(SEEDS / "static.yaml")
    sizes = {}
    for name in COMPARED:
        config = load(SEEDS / f"{name}.yaml")
        assert (config.data, config.train, config.optim) == (
            static.data,
            static.train,
            static.optim,
        ), name
        assert replace(config.model, moe_every=0, dense_dim=256) == static.model, name
        with torch.device("meta"):
            sizes[name] = Transformer(config.model, config.moe, 256).num_parameters()
    routers = {
        name: 2 * 96 * experts
        for name, experts in (("top_k", 8), ("deepseek_moe", 30), ("budget", 5))
    }
    for name, router in routers.items():
        assert sizes[name].active - router == sizes["static"].active, name
    assert (
        sizes["deepseek_moe"].total - routers["deepseek_moe"]
        == sizes["top_k"].total - routers["top_k"]
    )
    zero_cost = load(SEEDS / "zero_cost.yaml").moe
    assert (
        zero_cost.top_k * zero_cost.num_experts / count_choices(zero_cost) * zero_cost.expert_dim
        == static.model.dense_dim
    )


def test_explain_shows_cost_and_placement() -> None:
    sections = {section.key: section for section in explain(load(SEEDS / "budget.yaml"), 2)}
    numbers, words = sections["experts"].numbers, " ".join(sections["experts"].sentences)
    assert sorted(e for owner in numbers["owners"] for e in owner["experts"]) == [0, 1, 2, 3, 4]
    assert sum(owner["expected_work"] for owner in numbers["owners"]) == pytest.approx(1.0)
    assert "Cost of a row" in words
    assert "3 (288)" in words
    assert "budget of 0.5" in " ".join(sections["routing"].sentences)
    words = " ".join(
        next(s for s in explain(load(SEEDS / "zero_cost.yaml"), 2) if s.key == "experts").sentences
    )
    assert "8 zero, 9 copy, 10 constant, 11 constant" in words
