"""Worlds and models that are too large, and names in checkpoint.accept_changes."""

from __future__ import annotations

import pytest

from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.config.rules import check, check_memory

GIB = 1 << 30


@pytest.mark.parametrize("world", [0, -1, 10**10])
def test_a_world_that_cannot_be_is_refused(world: int) -> None:
    """The divisors of a world of 10000000000 ranks would take minutes to list."""
    with pytest.raises(ConfigError, match=r"world=.*must be a number of ranks"):
        check(load(None, ["parallel.ep=3"]), world)


def test_memory_counts_what_each_rank_of_this_machine_holds() -> None:
    """4 layers, 64 experts of 3 * 1024 * 4096 weights, 16 bytes each with gradient and moments."""
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


def test_fields_and_sections_can_be_accepted() -> None:
    check(load(None, ["checkpoint.accept_changes=[train.global_batch, moe.router, moe, data]"]))
