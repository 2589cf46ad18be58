"""`dmoe verify` of published models: green as they are, red with a bug in each part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.config.schema import Config
from dmoe.hf.experts import expert_rows
from dmoe.moe.capacity import apply_capacity
from dmoe.verify.published import narrow, randomize
from dmoe.verify.verify import verify
from tests.hf.families import FAMILIES, SAMPLED, tiny


def config_of(folder: Path, family: str, *more: str) -> Config:
    if not (folder / family).exists():
        tiny(family, torch.float32, vocab_size=256).save_pretrained(folder / family)
    return load(None, [f"model.source={folder / family}", "data.tokenizer=bytes", *more])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("deepseek_v3", "moe.capacity.factor=0.75 moe.balance.switch=0 moe.balance.bias=0.01"),
        (
            "gpt_oss",
            "moe.capacity.factor=0.75 moe.capacity.group=global moe.balance.switch_level=global"
            " moe.capacity.priority=score moe.capacity.pool=2 parallel.placement.kind=periodic",
        ),
    ],
)
def test_two_ranks_train_as_transformers(tmp_path: Path, family: str, settings: str) -> None:
    report = verify(config_of(tmp_path, family, *settings.split()), [2])
    assert report.ok, report.first
    assert any("EP=2 padded fsdp" in case for case in report.cases), report.cases


def in_this_process(ranks: int, function: Any, *args: Any, **more: Any) -> list[Any]:
    """Call what a single rank would run, without starting it."""
    assert ranks == 1
    return [function(0, 1, *args)]


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in SAMPLED])
def test_every_family_is_verified(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dmoe verify` with one world, in the process of the test: packed, padded, recomputed."""
    monkeypatch.setattr("dmoe.verify.verify.run_ranks", in_this_process)
    settings = ["moe.capacity.factor=0.75"]
    if family == "olmoe":
        settings += ["moe.balance.switch=0", "moe.balance.pooled=0.1"]
    report = verify(config_of(tmp_path, family, *settings), [1])
    assert report.ok, report.first
    assert len(report.cases) >= 2, report.cases


def dropless(routing: Any, shape: Any, capacity: Any, *more: Any) -> Any:
    """A bug of the layer: the choices beyond an expert's capacity are kept."""
    return apply_capacity(routing, replace(shape, capacity=None), capacity, *more)


def swapped_rows(experts: Any, rows_RD: torch.Tensor, tokens_per_expert: Any) -> torch.Tensor:
    """A bug of the experts: gate and up are taken for each other."""
    stack = experts.gate_up_proj
    stack.data = torch.cat(stack.data.chunk(2, 1)[::-1], 1)
    try:
        return expert_rows(experts, rows_RD, tokens_per_expert)
    finally:
        stack.data = torch.cat(stack.data.chunk(2, 1)[::-1], 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "part", "bug", "quantity"),
    [
        ("deepseek_v4", "moe.base_layer.apply_capacity", dropless, "capacity slots"),
        ("inkling2_text", "hf.layer.expert_rows", swapped_rows, "layer outputs"),
    ],
)
def test_a_bug_in_a_layer_is_found(
    family: str,
    part: str,
    bug: Any,
    quantity: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both families were left out of verify, which was red of them without any bug.

    Of DeepSeek-V4 it had no table of choices by token id, but zeros: expert 0 twice. Inkling-2 ran
    once before `torch.float32` meant float64, which its router does not survive.
    """
    monkeypatch.setattr("dmoe.verify.verify.run_ranks", in_this_process)

    def put_in() -> None:
        monkeypatch.setattr(f"dmoe.{part}", bug)

    report = verify(config_of(tmp_path, family, "moe.capacity.factor=0.75"), [1], patch=put_in)
    assert not report.ok
    assert report.first is not None
    assert report.first.quantity == quantity


def gate_and_up_swapped() -> None:
    """A conversion bug: the halves of the stacks are read in the other order."""
    from dmoe.hf import load as reader

    copy = reader._copy

    def swapped(model: torch.nn.Module, loaded: torch.nn.Module) -> None:
        copy(model, loaded)
        for name, parameter in model.named_parameters():
            if name.endswith("gate_up_proj"):
                parameter.data.copy_(torch.cat(parameter.data.chunk(2, 1)[::-1], 1))

    reader._copy = swapped


@pytest.mark.slow
def test_a_wrong_conversion_is_found(tmp_path: Path) -> None:
    report = verify(config_of(tmp_path, "mixtral"), [1], patch=gate_and_up_swapped)
    assert not report.ok
    assert report.first is not None
    assert report.first.quantity == "initial weights"


def test_float32_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use float64"):
        verify(config_of(tmp_path, "mixtral"), [1], dtype="float32")


@pytest.mark.parametrize("family", ["deepseek_v3", "mimo_v2_flash", "qwen3_next", "granitemoe"])
def test_the_narrow_model_keeps_the_kinds_of_layers(family: str) -> None:
    """From the default config of transformers, of up to hundreds of billions of parameters."""
    import transformers

    wide = transformers.AutoConfig.for_model(family)
    kinds = {*(getattr(wide, "layer_types", None) or ["full_attention"])}
    config = narrow(wide)
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model)
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000
    assert {*(getattr(config, "layer_types", None) or ["full_attention"])} == kinds
    experts = {
        type(module).__name__ for module in model.modules() if "Experts" in type(module).__name__
    }
    assert experts
    assert model(input_ids=torch.arange(8).unsqueeze(0)).logits.isfinite().all()
