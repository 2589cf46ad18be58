"""Capacity, losses, bias and stats run on the meta device, where reading a value raises.

That is what lets the padded layer run without a host sync on CUDA, and at any world size without
hardware.
"""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import product

import pytest
import torch
from torch import Tensor

from dmoe.config.schema import BalanceConfig, CapacityConfig
from dmoe.moe.capacity import apply_capacity
from dmoe.moe.load_balancing import auxiliary_losses, updated_bias
from dmoe.moe.metrics import layer_stats
from dmoe.moe.routing import BatchShape, Noise, Routing, TokenContext
from tests.moe.next_choice_cases import with_next_experts
from tests.moe.strategies import random_routing

TOKENS, WORLD = 24, 64


class MetaComm:
    """A rank of 64 that has no values, only shapes."""

    size, rank, averages = WORLD, 5, False

    def sum(self, value: Tensor) -> Tensor:
        return torch.empty_like(value)

    def gather(self, value: Tensor) -> Tensor:
        return value.new_empty(self.size, *value.shape)


def on_meta(routing: Routing) -> Routing:
    values = {field.name: getattr(routing, field.name) for field in fields(routing)}
    moved = {name: value.to("meta") for name, value in values.items() if isinstance(value, Tensor)}
    return replace(routing, **moved)


def routing_and_context(masked: float | None) -> tuple[Routing, TokenContext]:
    routing = on_meta(with_next_experts(random_routing(TOKENS, 5, 2, masked=masked), 3))
    score_TE = routing.score_TE.requires_grad_()
    routing = replace(
        routing, score_TE=score_TE, logit_TE=score_TE.log(), weight_TK=score_TE[:, :2]
    )
    valid_T = None if routing.selected_TK is None else routing.selected_TK[:, 0]
    prior_LE = torch.zeros(3, 5, dtype=torch.int64, device="meta")
    return routing, TokenContext(valid_T=valid_T, prior_count_LE=prior_LE)


CASES = list(
    product(
        ["rank", "sequence", "global"], ["position", "score"], ["drop", "next_choice"], [None, 0.4]
    )
)


@pytest.mark.parametrize(("group", "priority", "overflow", "masked"), CASES)
def test_capacity_and_stats(group: str, priority: str, overflow: str, masked: float | None) -> None:
    routing, _ = routing_and_context(masked)
    shape = BatchShape(4, 1, 3 * WORLD) if group == "global" else BatchShape(4, 4, 3)
    config = CapacityConfig(group=group, priority=priority, overflow=overflow, renormalize=True)  # type: ignore[arg-type]
    plan = apply_capacity(routing, shape, config, MetaComm())
    assert plan.slots is not None
    assert plan.slots.position_TK.shape == plan.expert_TK.shape
    assert plan.slots.capacity == (TOKENS if group == "global" else 3)
    plan.weight_TK.sum().backward()
    assert layer_stats(routing, plan).as_vector().shape == (14,)


@pytest.mark.parametrize("masked", [None, 0.4])
@pytest.mark.parametrize("level", ["sequence", "micro_batch", "global"])
def test_losses(level: str, masked: float | None) -> None:
    routing, context = routing_and_context(masked)
    routing = replace(routing, noise=Noise(routing.logit_TE, routing.score_TE))
    config = BalanceConfig(1.0, level, 1.0, 1.0, 1.0, 1.0)  # type: ignore[arg-type]
    losses = auxiliary_losses(
        routing, config, context, BatchShape(4, 4, 3), MetaComm(), layer=1, micro_batches=2
    )
    assert list(losses) == ["switch", "z", "importance", "load", "usage_std"]
    sum(losses.values(), torch.zeros((), device="meta")).backward()


def test_bias() -> None:
    count_LE = torch.zeros(3, 5, dtype=torch.int64, device="meta")
    assert updated_bias(torch.zeros(3, 5, device="meta"), count_LE, 0.1, recenter=True).shape == (
        3,
        5,
    )
