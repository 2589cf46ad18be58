"""`dmoe modules`: list, export, add, merge; `dmoe generate` and another run read the results.

`dmoe modules` runs in this process, by the same entry point as the real command. `dmoe train` and
`dmoe generate` run in processes of their own.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dmoe.modular import adapter_layers, inspect_modules
from dmoe.runs.directory import RunDir
from dmoe.train.restore import restore_model
from tests.cli.commands import dmoe, refused, run_in_process

pytestmark = pytest.mark.ranks

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
    listed = json.loads(run_in_process("modules", "list", str(run), "--json", cwd=place).stdout)[
        "places"
    ]
    assert listed[0] == {
        "place": "blocks.0.attention.w_qkv",
        "bank": "LoRA",
        "router": "ConstantRouter",
        "aggregation": "WeightedSum",
        "modules": 2,
        "parameters": 2 * 2 * (32 + 96),
    }
    assert (
        run_in_process(
            "modules", "export", str(run), "--to", "out.safetensors", cwd=place
        ).returncode
        == 0
    )
    assert len(inspect_modules(place / "out.safetensors").targets) == 4
    assert (
        "blocks.1.attention"
        in run_in_process("modules", "list", "out.safetensors", cwd=place).stdout
    )
    assert (
        run_in_process(
            "modules", "export", str(run), "--peft", "peft", "--module", "1", cwd=place
        ).returncode
        == 0
    )
    assert json.loads((place / "peft" / "adapter_config.json").read_text())["r"] == 2
    refused(
        run_in_process("modules", "export", str(run), "--peft", "peft", "--module", "2", cwd=place),
        "--module=2",
        "0 to 1",
    )
    refused(run_in_process("modules", "export", str(run), cwd=place), "--to=None", "one of")


def test_merge_writes_the_network_without_modules(run: Path, place: Path) -> None:
    result = run_in_process(
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
    for given, words in {
        "0.5": "one number for each of the 2",
        "a,b": "must be comma-separated numbers",
    }.items():
        refused(
            run_in_process(
                "modules", "merge", str(run), "--weights", given, "--to", "no", cwd=place
            ),
            words,
        )
    refused(
        run_in_process(
            "modules", "merge", str(run), "--weights", "1,0", "--to", "merged", cwd=place
        ),
        "already exists",
    )
    assert not (place / "no").exists()


def test_add_appends_modules_and_a_run_continues(
    run: Path, place: Path, small: tuple[str, ...]
) -> None:
    assert (
        run_in_process(
            "modules", "export", str(run), "--to", "more.safetensors", cwd=place
        ).returncode
        == 0
    )
    result = run_in_process(
        "modules", "add", str(run), "more.safetensors", "--to", "both", cwd=place
    )
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
        adapter_layers(restore_model(RunDir(place / "on")).model)[
            "blocks.0.attention.w_out"
        ].experts.b[:3],
        stack[:3],
    )


def test_a_run_without_modules_and_a_file_of_another_core(
    run: Path, alone: object, place: Path
) -> None:
    refused(run_in_process("modules", "list", "alone", cwd=place), "has no modules")
    refused(run_in_process("modules", "list", "nowhere", cwd=place), "RUN=nowhere")
    result = run_in_process(
        "modules", "merge", str(run), "--weights", "1,0", "--to", "other", cwd=place
    )
    assert result.returncode == 0
    refused(
        run_in_process("modules", "add", str(run), "corpus/0.py", "--to", "x", cwd=place),
        "cannot be read as a module file",
        code=3,
    )
