"""`parallel.exchange.library=deep_ep` on two ranks, against a stub with DeepEP's interface."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import dmoe
from dmoe.config.errors import ConfigError
from dmoe.config.schema import ExchangeConfig
from dmoe.distributed.expert_parallel import shard_experts
from dmoe.distributed.mesh import build_mesh
from dmoe.moe.layer import MoE
from tests.distributed import deep_ep_stub
from tests.distributed.test_exchange_options import DIM, layer_of, numbers
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared": {"shared": 1},
    "drops and zero-cost": {"factor": 0.8, "zero": 2},
    "two choices": {"top_k": 2},
    "one expert three times": {"repeated": True},
    "empty rank": {"workload": "W5", "top_k": 2},
    "ragged sources": {"tokens": (0, 24)},
    "recomputed": {"recompute": True},
    "different shapes": {"shapes": [[12], [4], [4], [8], [12], [8], [4], []]},
}


def compared(rank: int, world: int) -> dict[str, float]:
    """Return the largest relative difference from the packed exchange, in roundings of bf16."""
    deep_ep_stub.install()
    mesh, found = build_mesh(world, torch.device("cpu")), {}
    epsilon = torch.finfo(torch.bfloat16).eps
    for name, given in VARIANTS.items():
        settings = {"tokens": (24, 24), **given, "dtype": torch.bfloat16}
        plain = numbers(mesh, None, **settings)
        other = numbers(mesh, ExchangeConfig(library="deep_ep"), **settings)
        assert plain.keys() == other.keys()
        assert all((plain[f"stats{n}"] == other[f"stats{n}"]).all() for n in range(2)), name
        found[name] = max(
            np.abs(other[key] - value).max(initial=0) / np.abs(value).max(initial=1e-3) / epsilon
            for key, value in plain.items()
        )
    return found


def test_forward_and_backward_equal_the_packed_exchange() -> None:
    """Counts and drops exactly; outputs and all gradients within roundings of bfloat16."""
    for rank in run_ranks(2, compared):
        assert all(difference <= 4 for difference in rank.values()), rank


def refused(rank: int, world: int) -> list[str]:
    said, config = [], ExchangeConfig(library="deep_ep")
    mesh = build_mesh(world, torch.device("cpu"))

    def attempt(layer: MoE, exchange: ExchangeConfig) -> None:
        shard_experts(layer, mesh, exchange=exchange)
        layer(torch.zeros(1, 2, DIM, dtype=torch.float64))

    for layer, exchange in (
        (layer_of(), config),
        (layer_of(), config),
        (layer_of(factor=1.0, exchange="padded"), config),
        (layer_of(), replace(config, overlap=True)),
    ):
        with pytest.raises(ConfigError) as error:
            attempt(layer, exchange)
        said.append(str(error.value))
        deep_ep_stub.install()
    with pytest.raises(ConfigError) as error:
        dmoe.parallelize(layer_of(), ep=2, copies=2, exchange=config)
    said.append(str(error.value))
    layer = layer_of(dtype=torch.bfloat16)
    shard_experts(layer, mesh, exchange=config)
    timer: Any = layer.packed.expert_group.timer  # type: ignore[attr-defined]
    timer.start(time.perf_counter)
    x = torch.randn(1, 24, DIM, dtype=torch.bfloat16).requires_grad_()
    out = layer(x)
    out.y.sum().backward()
    tokens = int((out.plan.expert_TK // 4 != rank).any(1).sum())
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    dist.all_gather(counts, torch.tensor([tokens]))
    sent, received = tokens, int(counts[1 - rank])
    row = DIM * 2
    assert timer.sent_bytes == sent * (2 * row + 4 * 12) + received * (2 * row + 4 * 4)
    return said


def test_what_is_refused_and_what_is_counted() -> None:
    said = run_ranks(2, refused)[0]
    assert "library=deep_ep: needs the package deep_ep, which cannot be imported" in said[0]
    assert "library=deep_ep: sends rows of bfloat16, not of float64; use" in said[1]
    assert "library=deep_ep: needs the packed exchange" in said[2]
    assert "library=deep_ep: has an exchange of its own" in said[3]
    assert "library=deep_ep: has an exchange of its own" in said[4]
