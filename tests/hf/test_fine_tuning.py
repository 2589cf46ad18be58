"""Parts of a published model in the trainer: LoRA, experts only, a frozen router, some layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.config.rules import check
from dmoe.hf.compare import compare_directories
from dmoe.hf.export import export_checkpoint
from dmoe.hf.lora import is_lora
from dmoe.hf.lora_peft import export_lora
from dmoe.hf.published import PublishedDirectory
from tests.hf.families import tiny
from tests.hf.test_training import Trained, config_of, train
from tests.hf.tiny_hf import tokens
from tests.ranks import run_ranks

FAMILY = "mixtral"
CASES = {
    "lora": ["model.lora.rank=4", "model.lora.targets=[q_proj,experts]"],
    "experts": ['optim.trainable=["*.experts.*"]'],
    "frozen router": ["moe.router.freeze=true"],
    "second layer": ['optim.trainable=["*.layers.1.*"]'],
}
TRAINED = {
    "lora": is_lora,
    "experts": lambda name: ".experts." in name,
    "frozen router": lambda name: not name.endswith("mlp.gate.weight"),
    "second layer": lambda name: ".layers.1." in name,
}
MODES = {
    "lora": ["ddp", "fsdp"],
    "experts": ["ddp"],
    "frozen router": ["fsdp"],
    "second layer": ["ddp"],
}
"""Modes of two ranks that each case is compared in."""


def on_two_ranks(rank: int, world: int, folder: Path) -> dict[str, Trained]:
    found = {}
    for case, more in CASES.items():
        for mode in MODES[case]:
            half = [f"parallel.mode={mode}", "parallel.ep=2"]
            config = config_of(folder, FAMILY, *more, *half)
            found[f"{case}-{mode}"] = train(config, folder / case / mode)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fine_tuning")
    tiny(FAMILY, torch.float32, vocab_size=300).save_pretrained(made / FAMILY)
    return made


@pytest.mark.ranks
def test_two_ranks_train_the_same_parts_as_one_process(folder: Path) -> None:
    """Losses, norms and weights; what is not trained keeps its bytes."""
    one = {
        case: train(config_of(folder, FAMILY, *more), folder / case / "one")
        for case, more in CASES.items()
    }
    two = run_ranks(2, on_two_ranks, folder, timeout=150)
    source = {
        f"model.hf.{n}": v
        for n, v in tiny(FAMILY, torch.float32, vocab_size=300).state_dict().items()
    }
    for case, alone in one.items():
        weights = {n: v for n, v in alone.state.items() if n.startswith("model.")}
        for name, value in weights.items():
            moved = name not in source or not np.array_equal(value, source[name].numpy())
            assert moved == TRAINED[case](name), (case, name)
        for mode in MODES[case]:
            found = two[0][f"{case}-{mode}"]
            assert found.losses == pytest.approx(alone.losses, rel=1e-6)
            assert found.norms == pytest.approx(alone.norms, rel=1e-5)
            for name, value in weights.items():
                assert np.abs(found.state[name] - value).max() < 2e-5, (case, mode, name)


@pytest.mark.ranks
def test_a_run_with_lora_resumes_and_is_exported_merged_and_as_an_adapter(folder: Path) -> None:
    """peft with the adapter, and transformers with the merged weights, have the run's logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = config_of(folder, FAMILY, *CASES["lora"], "model.lora.alpha=6")
    place = folder / "run"
    before = train(config, place, save=True)
    resumed = train(config, place, resume=True)
    assert resumed.losses != before.losses
    (checkpoint,) = (place / "checkpoints").glob("step-*")
    source = str(folder / FAMILY)
    export_checkpoint(checkpoint, source, folder / "merged")
    assert export_lora(checkpoint, source, folder / "adapter") == 2 * (2 + 4)
    assert (
        compare_directories(
            PublishedDirectory(folder / "merged"), PublishedDirectory(source)
        ).problems
        == []
    )
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        ours, theirs, base_logits = (m(tokens()).logits for m in (merged, adapted, plain))
    assert (ours - theirs).abs().max() < 5e-6
    assert (ours - base_logits).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["model.lora.alpha=8"], "trains the weights themselves"),
        (["model.lora.rank=-1"], "must not be negative"),
    ],
)
def test_lora_that_cannot_work_is_refused(given: list[str], sentence: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check(config_of(folder, FAMILY, *given))


def test_lora_and_patterns_of_dmoes_own_network(folder: Path) -> None:
    """Two settings that freeze everything together ended in a traceback of torch's optimizer."""
    with pytest.raises(ConfigError, match=r"use modular\.bank=lora"):
        check(load(None, ["model.lora.rank=4"]))
    with pytest.raises(ConfigError, match="matches no parameter"):
        train(config_of(folder, FAMILY, 'optim.trainable=["*.nothing.*"]'), folder / "x")
    nothing = ['optim.trainable=["*.gate.*"]', "moe.router.freeze=true"]
    with pytest.raises(ConfigError, match="leaves no parameter to train"):
        train(config_of(folder, FAMILY, *nothing), folder / "x")
