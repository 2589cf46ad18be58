"""dmoe as expert-parallel implementation of transformers: the numbers of one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dmoe.config.errors import ConfigError
from dmoe.config.schema import CapacityConfig
from dmoe.hf import plugin
from tests.hf.families import tiny
from tests.hf.tiny_hf import tiny_directory, tokens
from tests.ranks import run_ranks

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")


def load_sharded(path: str, implementation: str = "dmoe", **sizes: int) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    os.environ["ACCELERATE_USE_CPU"] = "1"
    config = DistributedConfig(ep_implementation=implementation, **sizes)
    return AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        distributed_config=config,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plugin")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Any]:
    for family in FAMILIES:
        tiny_directory(family, folder / family)
    return run_ranks(2, measure, str(folder), timeout=120)


def measure(rank: int, world: int, folder: str) -> tuple[Any, Any]:
    return gradients(rank, world, folder), capacity_and_refusals(rank, world, f"{folder}/mixtral")


def gradients(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Loss, full gradients and counts of each family on half of the batch; saves each model."""
    plugin.register()
    found = {}
    for family in FAMILIES:
        model = load_sharded(f"{folder}/{family}", fsdp_size=2, ep_size=2).train()
        half = tokens().chunk(world)[rank]
        loss = model(input_ids=half, labels=half).loss
        loss.backward()
        grads = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
        counts = plugin.expert_counts(model)
        found[family] = {
            "loss": loss.item(),
            "grads": {name: grad.numpy() for name, grad in grads.items()},
            "counts": [layer.choice_E.numpy() for layer in counts.values()],
            "local": max(p.to_local().shape[0] for n, p in model.named_parameters() if ".experts.down_proj" in n),
        }  # fmt: skip
        model.save_pretrained(f"{folder}/{family}_saved")
    return found


@pytest.mark.ranks
def test_loss_and_gradients_are_those_of_one_process(folder: Path, ranks: list[Any]) -> None:
    for family in FAMILIES:
        model = tiny(family, torch.float32).train()
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        results = [found[family] for found, _ in ranks]
        assert sum(r["loss"] for r in results) / 2 == pytest.approx(loss.item(), abs=2e-6)
        assert results[0]["local"] == 4
        expected = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
        for result in results:
            assert result["grads"].keys() == expected.keys()
            for name, grad in expected.items():
                scale = np.abs(grad).max() + 1e-12
                assert np.abs(result["grads"][name] - grad).max() / scale < 5e-6, (family, name)
        layers = 1 if family == "deepseek_v3" else 2
        choices = np.sum([r["counts"] for r in results], axis=0)
        assert choices.shape == (layers, 8)
        assert choices.sum() == layers * tokens().numel() * 2
        source = load_file(folder / family / "model.safetensors")
        saved = load_file(folder / f"{family}_saved" / "model.safetensors")
        assert source.keys() == saved.keys()
        assert all(torch.equal(saved[name], value) for name, value in source.items())


def capacity_and_refusals(rank: int, world: int, folder: str) -> Any:
    plugin.register(CapacityConfig(factor=0.5, eval_factor=None), name="tight")
    model = load_sharded(folder, "tight", fsdp_size=2, ep_size=2).train()
    half = tokens().chunk(world)[rank]
    model(input_ids=half)
    (counts, *_) = plugin.expert_counts(model).values()
    first = counts.choice_E.tolist(), counts.kept_E.tolist()
    counts.reset()
    model.eval()(input_ids=half)
    plugin.register()
    try:
        load_sharded(folder, "dmoe", tp_size=2, ep_size=2)
    except ConfigError as error:
        return first, (counts.choice_E.tolist(), counts.kept_E.tolist()), str(error)
    raise AssertionError("tensor parallelism was not refused")


@pytest.mark.ranks
def test_capacity_and_the_refusal_of_tensor_parallelism(ranks: list[Any]) -> None:
    """The kept rows are min(choices, slots) of each rank's own tokens; evaluation is dropless."""
    for _, ((choices, kept), (eval_choices, eval_kept), message) in ranks:
        slots = int(0.5 * 2 * 32 / 8)
        assert kept == [min(count, slots) for count in choices]
        assert sum(kept) < sum(choices) == 64
        assert eval_kept == eval_choices
        assert message.startswith("DistributedConfig.tp_size=2: must be 1")


@pytest.mark.parametrize(
    "capacity", [CapacityConfig(factor=1.0, group="global"), CapacityConfig(overflow="next_choice")]
)
def test_a_capacity_that_needs_more_than_transformers_passes_is_refused(
    capacity: CapacityConfig,
) -> None:
    with pytest.raises(ConfigError, match="transformers passes"):
        plugin.register(capacity)


@pytest.mark.parametrize("capacity", [CapacityConfig(factor=-2.0), 1.25])
def test_a_capacity_that_is_none_is_refused_as_by_moefy(capacity: Any) -> None:
    """A negative factor was taken, and failed or dropped everything in the first forward."""
    with pytest.raises(ConfigError, match=r"capacity(\.factor)?=.*must be"):
        plugin.register(capacity, name="none")


def test_an_older_transformers_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.distributed.expert_parallel as module

    monkeypatch.delattr(module, "EPImplementationInterface")
    with pytest.raises(ConfigError, match=r"new in 5\.23"):
        plugin.register()
