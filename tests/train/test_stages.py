"""Training stages: a base model that `modular.core` names is trained first, by the same command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from dmoe.config.errors import ConfigError
from dmoe.config.load import to_yaml
from dmoe.runs.directory import RunDir
from dmoe.train.modular.stages import base_model_config, check_base_models
from dmoe.train.run import train
from tests.tiny import tiny
from tests.train.test_modules import LORA, lines

pytestmark = pytest.mark.ranks


def test_a_base_model_config_is_trained_first_and_once(tmp_path: Path) -> None:
    (tmp_path / "core.yaml").write_text(to_yaml(tiny("train.steps=2", "train.sample_tokens=0")))
    config = tiny(
        *LORA,
        "train.steps=2",
        "train.sample_tokens=0",
        f"train.run_dir={tmp_path / 'run'}",
        f"modular.core={tmp_path}/core.yaml",
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    train(config, "", quiet=True)
    core, run = lines(tmp_path / "run" / "core"), lines(tmp_path / "run")
    assert core[-1]["event"] == run[-1]["event"] == "end"
    assert run[-1]["core_unchanged"] is True
    start = next(line for line in run if line["event"] == "start")
    assert 0 < start["trainable_parameters"] < start["parameters"]
    modules = next(line for line in run if line["event"] == "train")["modules"]
    assert [place["place"] for place in modules][:1] == ["blocks.0.attention.w_qkv"]
    assert sum(modules[0]["load"]) == 2 * 8 * 16
    AcceleratorState._reset_state(reset_partial_state=True)
    train(
        replace(config, train=replace(config.train, run_dir=str(tmp_path / "again"))),
        "",
        quiet=True,
    )
    assert lines(tmp_path / "again" / "core")[-1]["step"] == 2
    AcceleratorState._reset_state(reset_partial_state=True)
    train(
        replace(config, train=replace(config.train, steps=3), checkpoint=config.checkpoint),
        "",
        quiet=True,
    )
    assert lines(tmp_path / "run" / "core") == core, "a finished base model was trained again"


def test_an_impossible_base_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "core.yaml").write_text(to_yaml(tiny("model.dim=64")))
    with pytest.raises(ConfigError, match=r"model\.dim=32: the base model .* has 64"):
        check_base_models(tiny(*LORA, f"modular.core={tmp_path}/core.yaml"), 1)
    with pytest.raises(ConfigError, match=r"modular\.core=nowhere"):
        check_base_models(tiny(*LORA, "modular.core=nowhere"), 1)
    (tmp_path / "round.yaml").write_text(to_yaml(tiny(f"modular.core={tmp_path}/round.yaml")))
    with pytest.raises(ConfigError, match="start from each other"):
        check_base_models(tiny(f"modular.core={tmp_path}/round.yaml"), 1)


def test_a_missing_base_model_config_names_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another directory, the message named the field CONFIG and no directory."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=rf"modular\.core=configs/own\.yaml: is not in {tmp_path}"
    ):
        check_base_models(tiny("modular.core=configs/own.yaml"), 1)
    # one that dmoe ships is found from everywhere
    base, _ = base_model_config(tiny("modular.core=configs/modular/core.yaml"))
    assert base.model.dim == 64


def test_training_the_base_model_first_is_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs were reported one after the other, without a reason."""
    small = ("train.steps=1", "train.sample_tokens=0")
    (tmp_path / "core.yaml").write_text(to_yaml(tiny(*small)))
    AcceleratorState._reset_state(reset_partial_state=True)
    core, run = tmp_path / "core.yaml", tmp_path / "run"
    train(tiny(*small, "modular.bank=scale", f"modular.core={core}", f"train.run_dir={run}"), "")
    assert capsys.readouterr().out.startswith(f"first its core, from {core}: {run}/core\n")


def test_latest_is_never_a_base_model(tmp_path: Path) -> None:
    """A run that trains its base model first got a link RUN/latest to RUN/core."""
    run = tmp_path / "runs" / "one"
    for directory in (RunDir(run), RunDir(run / "core")):
        directory.create(None)
        directory.write_config(tiny(), "")
    assert not (run / "latest").is_symlink()
    assert (tmp_path / "runs" / "latest").resolve() == run
