"""Padding is nobody: it takes no slot, counts in no loss, and what it holds is felt by no one.

The output of a padded position is exactly zero, that of shared experts included: its input is set
to zero before the router, so that no weight can get a gradient from what it held.
"""

from __future__ import annotations

import pytest
import torch

from dmoe.config.schema import BalanceConfig, CapacityConfig, ExpertsConfig
from dmoe.moe.routing import TokenContext
from tests.moe.layers import close, gradients, make, tokens_of

VALID = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [True] * 3 + [False] * 3, [False] * 6])
CONTEXT = TokenContext(valid_T=VALID.flatten())
LIMITS = [("packed", None), ("packed", 0.7), ("padded", 0.7)]
LEVELS = ["sequence", "micro_batch", "global"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("exchange", "factor"), LIMITS)
def test_what_padding_holds_is_felt_by_no_one(
    exchange: str, factor: float | None, level: str
) -> None:
    results = []
    for scale in (1.0, 100.0):
        x = tokens_of(4, 6).detach()
        x[~VALID] *= scale
        layer = make(
            capacity=CapacityConfig(factor=factor),
            exchange=exchange,
            balance=BalanceConfig(switch_level=level),  # type: ignore[arg-type]
        )
        output, gradient = gradients(layer, x.requires_grad_(), CONTEXT)
        assert not output.y[~VALID].any()
        assert not gradient["x"][~VALID].any()
        results.append((output.y, gradient, output.aux, output.stats.as_vector()))
    for one, two in zip(*results, strict=True):
        close(one, two, 1e-14)


@pytest.mark.parametrize("level", LEVELS)
def test_padding_can_be_left_out_when_dropless(level: str) -> None:
    """A padded sequence equals the short one (dropless: a capacity counts positions)."""
    layer = make(balance=BalanceConfig(switch_level=level))  # type: ignore[arg-type]
    x = tokens_of(1, 6)
    padded, gradient = gradients(
        layer, x, TokenContext(valid_T=torch.tensor([True] * 4 + [False] * 2))
    )
    short, gradient_short = gradients(layer, x.detach()[:, :4].clone().requires_grad_())
    close(padded.y[:, :4], short.y)
    close(padded.aux, short.aux)
    close(gradient["x"][:, :4], gradient_short["x"])
    close(
        {name: g for name, g in gradient.items() if name != "x"},
        {n: g for n, g in gradient_short.items() if n != "x"},
    )


def test_a_mask_of_ones_is_no_mask() -> None:
    limits = CapacityConfig(factor=0.7)
    x = tokens_of(3, 5)
    one, gradient_one = gradients(make(capacity=limits), x)
    two, gradient_two = gradients(
        make(capacity=limits), x, TokenContext(valid_T=torch.ones(15, dtype=torch.bool))
    )
    close(one.y, two.y)
    close(one.aux, two.aux)
    close(gradient_one, gradient_two)


@pytest.mark.parametrize(("exchange", "factor"), LIMITS)
def test_nothing_but_padding(exchange: str, factor: float | None) -> None:
    layer = make(capacity=CapacityConfig(factor=factor), exchange=exchange)
    output, gradient = gradients(
        layer, tokens_of(2, 3), TokenContext(valid_T=torch.zeros(6, dtype=torch.bool))
    )
    assert not output.y.any()
    assert all(not bool(value) for value in output.aux.values())
    assert all(not g.any() for g in gradient.values())
    assert not output.stats.choice_E.any()


def test_shared_experts_leave_padding_out() -> None:
    layer = make(experts=ExpertsConfig(shared=1))
    assert layer.shared is not None
    x = tokens_of(4, 6)
    y = layer(x, CONTEXT).y
    assert not y[~VALID].any()
    assert bool((y[VALID] != layer(x).y[VALID] - layer.shared(x)[VALID]).any())
