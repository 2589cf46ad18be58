"""`dmoe modules`: what a run has, taken out, put in, merged; and `dmoe generate` and the next run go on from it.

The commands on modules run in this process, through the same `main.answer` as the real command: four starts of an interpreter a test
proved nothing. `dmoe train` and `dmoe generate`, which read what was written, are processes of their own.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dmoe.modular import inspect_modules, adapter_layers
from dmoe.runs.directory import RunDir
from dmoe.train.restore import restore_model
from tests.cli.commands import answered, dmoe, refused

MODULES = ("modular.bank=low_rank", "modular.modules=2", "modular.rank=2")


@pytest.fixture(scope="module")
def run(place: Path, small: tuple[str, ...]) -> Path:
    path = place / "with-modules"
    result = dmoe(
        "train",
        *small,
        *MODULES,
        "train.steps=2",
        "train.sample_tokens=0",
        f"train.run_dir={path}",
        cwd=place,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "unchanged by hash: the base model" in result.stdout
    return path


def test_list_export_and_list_the_file(run: Path, place: Path) -> None:
    told = json.loads(answered("modules", "list", str(run), "--json", cwd=place).stdout)["places"]
    assert told[0] == {
        "place": "blocks.0.attention.w_qkv",
        "bank": "LowRank",
        "router": "ConstantRouter",
        "aggregation": "WeightedSum",
        "modules": 2,
        "parameters": 2 * 2 * (32 + 96),
    }
    assert (
        answered("modules", "export", str(run), "--to", "out.safetensors", cwd=place).returncode
        == 0
    )
    assert len(inspect_modules(place / "out.safetensors").targets) == 4
    assert "blocks.1.attention" in answered("modules", "list", "out.safetensors", cwd=place).stdout
    assert (
        answered(
            "modules", "export", str(run), "--peft", "peft", "--module", "1", cwd=place
        ).returncode
        == 0
    )
    assert json.loads((place / "peft" / "adapter_config.json").read_text())["r"] == 2
    refused(
        answered("modules", "export", str(run), "--peft", "peft", "--module", "2", cwd=place),
        "--module=2",
        "0 to 1",
    )
    refused(answered("modules", "export", str(run), cwd=place), "--to=None", "one of")


def test_merge_writes_the_plain_network(run: Path, place: Path) -> None:
    result = answered(
        "modules", "merge", str(run), "--weights", "0.25,0.75", "--to", "merged", cwd=place
    )
    assert result.returncode == 0, result.stderr
    before, after = restore_model(RunDir(run)).model, restore_model(RunDir(place / "merged")).model
    assert not adapter_layers(after)
    bank = adapter_layers(before)["blocks.0.attention.w_out"].experts
    wanted = (
        before.get_submodule("blocks.0.attention.w_out").weight
        + 0.25 * bank.weight_delta(0).t()
        + 0.75 * bank.weight_delta(1).t()
    )
    torch.testing.assert_close(after.get_submodule("blocks.0.attention.w_out").weight, wanted)
    assert dmoe("generate", "merged", "--prompt", "a", "--tokens", "2", cwd=place).returncode == 0
    for given, words in {"0.5": "one number for each of the 2", "a,b": "must be comma-separated numbers"}.items():
        refused(
            answered("modules", "merge", str(run), "--weights", given, "--to", "no", cwd=place),
            words,
        )
    refused(
        answered("modules", "merge", str(run), "--weights", "1,0", "--to", "merged", cwd=place),
        "already exists",
    )
    assert not (place / "no").exists()


def test_add_puts_modules_behind_the_others_and_a_run_goes_on(
    run: Path, place: Path, small: tuple[str, ...]
) -> None:
    assert (
        answered("modules", "export", str(run), "--to", "more.safetensors", cwd=place).returncode
        == 0
    )
    result = answered("modules", "add", str(run), "more.safetensors", "--to", "both", cwd=place)
    assert result.returncode == 0, result.stderr
    found = restore_model(RunDir(place / "both"))
    stack = adapter_layers(found.model)["blocks.0.attention.w_out"].experts.b
    assert len(stack) == 4
    assert torch.equal(stack[:2], stack[2:])
    assert found.config.modular.weights == [0.5, 0.5, 0.0, 0.0]
    more = (
        *MODULES,
        "modular.modules=4",
        "modular.core=both",
        "train.steps=1",
        "train.sample_tokens=0",
    )
    result = dmoe("train", *small, *more, "modular.train=one_module", "train.run_dir=on", cwd=place)
    assert result.returncode == 0, result.stderr[-2000:]
    assert torch.equal(
        adapter_layers(restore_model(RunDir(place / "on")).model)["blocks.0.attention.w_out"].experts.b[:3],
        stack[:3],
    )


def test_a_run_without_modules_and_a_file_of_another_core(
    run: Path, alone: object, place: Path
) -> None:
    refused(answered("modules", "list", "alone", cwd=place), "has no modules")
    refused(answered("modules", "list", "nowhere", cwd=place), "RUN=nowhere")
    result = answered("modules", "merge", str(run), "--weights", "1,0", "--to", "other", cwd=place)
    assert result.returncode == 0
    refused(
        answered("modules", "add", str(run), "corpus/0.py", "--to", "x", cwd=place),
        "cannot be read as a module file",
        code=3,
    )
