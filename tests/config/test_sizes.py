"""Numbers that no machine can mean, and names that no field has: refused before anything is allocated."""

from __future__ import annotations

import pytest

from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.config.rules import check, check_memory

GIB = 1 << 30
ABSURD = {
    "width": (["model.dim=10000000000"], "model.dim=10000000000: must be at most 1048576"),
    "layers": (["model.layers=1000000"], "model.layers=1000000: must be at most 10000"),
    "experts": (["moe.num_experts=100000000"], "moe.num_experts=100000000: must be at most"),
    "ranks": (["parallel.ep=10000000000"], "parallel.ep=10000000000: must be at most"),
    "steps": (["train.steps=1000000000000000"], "train.steps=1000000000000000: must be at most"),
    "text of many digits": (
        [f'train.steps="{"9" * 400}"'],
        "train.steps=999999999999... (400 digits): must be at most",
    ),
    "time-out": (["parallel.timeout=1e300"], "parallel.timeout=1e+300: must be at most"),
    "experts together": (
        ["model.dim=1048576", "moe.num_experts=65536", "moe.expert_dim=1048576"],
        "moe.num_experts=65536: gives",
    ),
    "width and layers": (
        ["model.dim=1048576", "model.layers=10000", "model.moe_every=0", "model.heads=8192"],
        "model.dim=1048576: gives",
    ),
    "tokens": (
        ["train.global_batch=100000", "data.seq_len=100000000"],
        "train.global_batch=100000: times data.seq_len",
    ),
}
NAMES = {
    "a field": ("train.global_bach", "did you mean train.global_batch?"),
    "a section": ("trian", "did you mean train?"),
    "a field without its section": ("qqqqq", "dmoe explain --fields"),
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_numbers_are_refused(name: str) -> None:
    overrides, words = ABSURD[name]
    with pytest.raises(ConfigError) as refusal:
        check(load(None, overrides))
    assert words in str(refusal.value)


@pytest.mark.parametrize("world", [0, -1, 10**10])
def test_a_world_that_cannot_be_is_refused(world: int) -> None:
    """`dmoe explain parallel.ep=3 --world 10000000000` listed every number up to the world that divides it."""
    with pytest.raises(ConfigError, match=r"world=.*must be a number of ranks"):
        check(load(None, ["parallel.ep=3"]), world)


def test_memory_counts_what_each_rank_of_this_machine_holds() -> None:
    """4 layers, 64 experts of 3 * 1024 * 4096 weights: each takes 16 bytes with its gradient and moments."""
    config = load(
        None,
        [
            "model.dim=1024",
            "model.layers=4",
            "moe.num_experts=64",
            "moe.expert_dim=4096",
            "train.global_batch=8",
        ],
    )
    experts = 16 * 4 * 64 * 3 * 1024 * 4096
    dense = 16 * 4 * 4 * 1024 * 1024
    for world, local, needed in (
        (1, 1, experts + dense),
        (2, 2, experts + 2 * dense),
        (2, 1, experts // 2 + dense),
    ):
        check_memory(config, world, local, needed)
        with pytest.raises(
            ConfigError,
            match=r"moe\.num_experts=64: gives .* parameters, whose training takes at least",
        ):
            check_memory(config, world, local, needed - 1)
    sharded = load(
        None, ["model.dim=1024", "moe.num_experts=4", "parallel.mode=fsdp", "parallel.ep=1"]
    )
    check_memory(sharded, 4, 1, GIB)
    with pytest.raises(ConfigError, match=r"model\.dim=1024"):
        check_memory(sharded, 4, 4, 1 << 20)


@pytest.mark.parametrize("name", NAMES)
def test_accepted_changes_are_fields_or_sections(name: str) -> None:
    wrong, fix = NAMES[name]
    with pytest.raises(ConfigError) as refusal:
        check(load(None, [f"checkpoint.accept_changes=[optim, {wrong}]"]))
    assert f"checkpoint.accept_changes={wrong}: is neither a field nor a section" in str(
        refusal.value
    )
    assert fix in str(refusal.value)


def test_fields_and_sections_can_be_accepted() -> None:
    check(load(None, ["checkpoint.accept_changes=[train.global_batch, moe.router, moe, data]"]))
