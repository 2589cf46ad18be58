"""Sets of modules, each evaluated over every domain: `modular.compositions`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from dmoe.config.errors import ConfigError
from dmoe.config.load import to_yaml
from dmoe.config.rules import check
from dmoe.config.schema import Config
from dmoe.distributed import init as worlds
from dmoe.explain import explain
from dmoe.modular import adapter_layers
from dmoe.runs.directory import RunDir
from dmoe.train import engine as engines
from dmoe.train.engine import Engine
from dmoe.train.evaluation import evaluate
from dmoe.train.modular.session import evaluate_compositions
from dmoe.train.modular.stages import check_base_models
from dmoe.train.restore import check_same_run
from dmoe.train.run import train
from dmoe.train.signals import StopRequested
from dmoe.verify.naive.modular import randomize
from tests.ranks import run_ranks
from tests.tiny import VOCAB, tiny

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
    randomize(engine)  # else every module adds nothing
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
    """And the table is the run's own again afterwards."""
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


def test_two_ranks_that_share_the_modules_say_the_same() -> None:
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
    """They are evaluated at the end and train nothing, but a resumed run was refused for them."""
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
def test_what_was_taken_without_a_word_is_refused(overrides: str) -> None:
    """Compositions without a table were evaluated, all alike; weights of NaN trained to the guard's verdict; a table that names no
    module ended in an error about a field `rows`, which no config has."""
    with pytest.raises(ConfigError, match=overrides.split()[-1].split("=")[0]):
        check(tiny("modular.bank=low_rank", "modular.modules=2", *overrides.split()), 1)


def test_a_core_config_that_is_not_here_says_where_was_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`modular.core` of the shipped configs starts at the repository: from elsewhere, the message named the field CONFIG, and no
    directory."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=rf"modular\.core=configs/modular/core\.yaml: is not in {tmp_path}"
    ):
        check_base_models(tiny("modular.core=configs/modular/core.yaml"), 1)


def test_it_is_said_that_a_core_is_trained_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs told of themselves one after the other, and nothing said why there were two."""
    small = ("train.steps=1", "train.sample_tokens=0")
    (tmp_path / "core.yaml").write_text(to_yaml(tiny(*small)))
    AcceleratorState._reset_state(reset_partial_state=True)
    core, run = tmp_path / "core.yaml", tmp_path / "run"
    train(tiny(*small, "modular.bank=scale", f"modular.core={core}", f"train.run_dir={run}"), "")
    assert capsys.readouterr().out.startswith(f"first its core, from {core}: {run}/core\n")


def test_latest_names_no_core(tmp_path: Path) -> None:
    """The run that trains its core first got a link RUN/latest to RUN/core."""
    run = tmp_path / "runs" / "one"
    for directory in (RunDir(run), RunDir(run / "core")):
        directory.create(None)
        directory.write_config(tiny(), "")
    assert not (run / "latest").is_symlink()
    assert (tmp_path / "runs" / "latest").resolve() == run


@pytest.mark.parametrize(
    ("what", "world"), [("joint", 1), ("modules", 2), ("one_module", 1), ("router", 1)]
)
def test_memory_is_that_of_a_real_rank(what: str, world: int) -> None:
    """`dmoe explain` left modules out, and counted gradients and moments of what is frozen."""
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
    """Weights, and those with moments."""
    engine = build(config)
    trained = sum(p.numel() for group in engine.optimizer.param_groups for p in group["params"])
    return sum(p.numel() for p in engine.model.parameters()), trained
