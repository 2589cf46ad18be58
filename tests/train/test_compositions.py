"""Sets of modules, each evaluated over every domain: `modular.compositions`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from dmoe.config.errors import ConfigError
from dmoe.config.rules import check
from dmoe.config.schema import Config
from dmoe.distributed import init as worlds
from dmoe.explain import explain
from dmoe.modular import adapter_layers
from dmoe.train import engine as engines
from dmoe.train.engine import Engine
from dmoe.train.evaluation import evaluate
from dmoe.train.modular.session import evaluate_compositions
from dmoe.train.restore import check_same_run
from dmoe.train.signals import StopRequested
from dmoe.verify.naive.adapters import randomize
from tests.ranks import run_ranks
from tests.tiny import VOCAB, tiny

pytestmark = pytest.mark.ranks

SETS = [[], [1], [0, 1], [3, 2]]
TABLE = (
    "modular.bank=adapter",
    "modular.modules=4",
    "modular.routing=table",
    "modular.table=[[0,1]]",
)
COMPOSED = tiny(
    *TABLE,
    "modular.compositions=[[],[1],[0,1],[3,2]]",
    "modular.hidden=4",
    "train.eval_sequences=8",
)


def build(config: Config) -> Engine:
    AcceleratorState._reset_state(reset_partial_state=True)
    check(config, worlds.launched_world_size())
    engine = engines.build_engine(config, worlds.init_distributed("cpu"), VOCAB)
    randomize(engine)  # new modules add nothing
    return engine


def composed(rank: int, world: int) -> list[dict[str, Any]]:
    engine = build(COMPOSED)
    data = engine.task.open_data()
    found = evaluate_compositions(engine, data, lambda: False)
    assert found is not None
    for layer in adapter_layers(engine.model).values():
        assert layer.router.get_buffer("module_LK").tolist() == [[0, 1]]
    return found


def losses(found: list[dict[str, Any]]) -> list[float]:
    return [next(iter(entry["by_domain"].values()))["loss"] for entry in found]


def test_a_composition_is_an_evaluation_with_that_table() -> None:
    """The table is restored afterwards."""
    found = composed(0, 1)
    assert [entry["modules"] for entry in found] == SETS
    assert len(set(losses(found))) == len(SETS)
    for modules, loss in zip(SETS, losses(found), strict=True):
        table = COMPOSED.modular.table if modules == [] else [modules]
        engine = build(
            replace(COMPOSED, modular=replace(COMPOSED.modular, table=table, compositions=[]))
        )
        if modules == []:
            for layer in adapter_layers(engine.model).values():
                for stack in layer.experts.stacked_tensors().values():
                    stack.data.zero_()
        result = evaluate(engine, engine.task.open_data())
        assert result is not None
        assert loss == pytest.approx(result.loss, rel=1e-6)


def test_two_ranks_that_share_the_modules_agree() -> None:
    alone = losses(composed(0, 1))
    for found in run_ranks(2, composed):
        assert losses(found) == pytest.approx(alone, rel=1e-5)


def test_a_signal_in_the_middle_leaves_the_table_as_it_was() -> None:
    # an evaluation is one batch: stop in the second one, of [1]
    engine, answers = build(COMPOSED), iter([False, True])
    before = {name: value.clone() for name, value in engine.model.state_dict().items()}
    with pytest.raises(StopRequested):
        evaluate_compositions(engine, engine.task.open_data(), lambda: next(answers, True))
    for name, value in engine.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert engine.wrapped_model.training


def test_other_compositions_do_not_make_another_run() -> None:
    """They are only evaluated at the end, but a resumed run was refused for them."""
    check_same_run(
        asdict(COMPOSED), "data", tiny(*TABLE, "modular.hidden=4", "train.eval_sequences=8"), "data"
    )


@pytest.mark.parametrize(
    "overrides",
    [
        "modular.compositions=[[0]]",
        "modular.weights=[.nan,1]",
        "modular.weights=[.inf,1]",
        "modular.routing=table modular.table=[[],[]]",
    ],
)
def test_settings_that_were_silently_accepted_are_refused(overrides: str) -> None:
    """Compositions without a table, weights of NaN, and a table without modules."""
    with pytest.raises(ConfigError, match=overrides.split()[-1].split("=")[0]):
        check(tiny("modular.bank=low_rank", "modular.modules=2", *overrides.split()), 1)


@pytest.mark.parametrize(
    ("what", "world"), [("joint", 1), ("modules", 2), ("one_module", 1), ("router", 1)]
)
def test_memory_is_that_of_a_real_rank(what: str, world: int) -> None:
    """`dmoe explain` ignored modules, and counted gradients and moments of frozen parameters."""
    config = tiny(
        "modular.bank=low_rank",
        "modular.modules=4",
        "modular.routing=top_k",
        f"modular.train={what}",
        f"parallel.ep={world}",
    )
    told = next(section.numbers for section in explain(config, world) if section.key == "size")[
        "rank_bytes"
    ]
    for weights, moments in run_ranks(world, held, config) if world > 1 else [held(0, 1, config)]:
        assert (told["weights"], told["moments"], told["gradients"]) == (
            4 * weights,
            8 * moments,
            4 * moments,
        )
        assert told["total"] == 4 * weights + 12 * moments


def held(rank: int, world: int, config: Config) -> tuple[int, int]:
    """Return the number of parameters, and of those with optimizer moments."""
    engine = build(config)
    trained = sum(p.numel() for group in engine.optimizer.param_groups for p in group["params"])
    return sum(p.numel() for p in engine.model.parameters()), trained
