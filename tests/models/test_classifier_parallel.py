"""The classifier on two real ranks has the loss, counts and gradients of one process."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dmoe.config.schema import ModelConfig
from dmoe.distributed import mesh
from dmoe.distributed.expert_parallel import expert_parameters, shard_experts
from dmoe.moe.routing import TokenContext
from tests.models.classifier_cases import (
    ALONE,
    BUDGET,
    FIXED,
    GATED,
    SOFT,
    SPARSE,
    build_classifier,
    random_samples,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks

CASES = {
    "gated": (replace(GATED, stream_dropout=0.5), FIXED, [4, 3], 3),
    "soft": (ALONE, SOFT, [4, 3], 3),
    "budget": (ALONE, BUDGET, [64, 36], 10),
    "blocks": (ModelConfig(dim=6, layers=2, head="experts"), SPARSE, [4, 3], 3),
}


def numbers(rank: int, world: int, names: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """Return, per case, this rank's loss and counts, summed dense gradients, expert gradients."""
    groups, found = mesh.build_mesh(world, torch.device("cpu")), {}
    for name in names:
        config, moe, widths, classes = CASES[name]
        model = build_classifier(config, moe, widths, classes)
        shard_experts(model, groups)
        experts = expert_parameters(model)
        each = 8 // world
        mine = slice(rank * each, (rank + 1) * each)
        x_BW, class_B1 = (
            random_samples(widths, 8)[mine],
            (torch.arange(8) % classes).unsqueeze(1)[mine],
        )
        x_BW[0, 0] = (
            torch.nan if len(moe.experts.shapes) == 0 and rank == 0 else x_BW[0, 0]
        )  # one stream was never there
        out = model(x_BW, class_B1, TokenContext(noise_key=(0, 3), first_sequence=rank * each))
        out.loss_sum.backward()
        result = {
            "loss": out.loss_sum.detach(),
            "counts": torch.stack([stats.choice_E for stats in out.stats]),
        }
        for parameter_name, parameter in model.named_parameters():
            gradient = parameter.grad
            assert gradient is not None, parameter_name
            if world > 1 and parameter_name not in experts:
                dist.all_reduce(gradient)
            result[parameter_name] = gradient
        found[name] = {key: value.numpy() for key, value in result.items()}
    return found


def whole(ranks: list[dict[str, np.ndarray]], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Combine a value of all ranks: add losses and counts, concatenate stacks of experts.

    Everything else has one owner or is equal on all ranks.
    """
    there = [rank[name] for rank in ranks if name in rank]
    if name in ("loss", "counts"):
        return np.sum(there, axis=0)
    return there[0] if there[0].shape == shape else np.concatenate(there)


def test_two_ranks_are_one_process() -> None:
    alone = numbers(0, 1, list(CASES))
    ranks = run_ranks(2, numbers, list(CASES))
    for case in CASES:
        parts = [rank[case] for rank in ranks]
        assert any(
            parts[0].get(name, np.zeros(0)).shape != value.shape
            for name, value in alone[case].items()
        ), "not shared"
        for name, expected in alone[case].items():
            got = whole(parts, name, expected.shape)
            assert np.abs(got - expected).max() <= 1e-11 * max(1.0, np.abs(expected).max()), (
                f"{case}: {name}"
            )
    assert alone["gated"]["counts"].sum() < 16 - 1, "no stream was dropped: the test proves nothing"
