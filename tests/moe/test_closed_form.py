"""Losses and weights with a gradient written out, against the same formulas left to autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dmoe import MoE
from dmoe.config.schema import BalanceConfig, RouterConfig
from dmoe.moe.capacity import dropless_plan
from dmoe.moe.constants import HostConstant
from dmoe.moe.dispatch import packed_permutation
from dmoe.moe.interfaces import NoComm
from dmoe.moe.load_balancing import auxiliary_losses
from dmoe.moe.placement import to_physical_experts
from dmoe.moe.routers import build_router
from dmoe.moe.routers.base import combine_weights
from dmoe.moe.routers.projection import renormalized_softmax
from dmoe.moe.routing import EMPTY_CONTEXT, BatchShape, Routing

SHAPE = BatchShape(sequences=3)


def parts(routing: Routing, balance: BalanceConfig, weight_TK: Tensor) -> list[Tensor]:
    losses = auxiliary_losses(
        routing, balance, EMPTY_CONTEXT, SHAPE, NoComm(), layer=0, micro_batches=2
    )
    return [weight_TK, *losses.values()]


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize(
    "coefficients",
    [
        {"switch": 0.1, "z": 0.1},
        {"switch": 0.1, "z": 0.1, "switch_level": "sequence"},
        {"switch": 0.1, "z": 0.0},
        {"switch": 0.0, "z": 0.1},
        {"switch": 0.0, "z": 0.0},
        {"switch": 0.1, "z": 0.1, "importance": 0.1},
    ],
    ids=str,
)
def test_losses_and_weights_equal_what_autograd_makes_of_the_formulas(
    coefficients: dict[str, float | str], scale: float
) -> None:
    """Values and the gradients of tokens and router, in float64; all upstream gradients differ."""
    torch.manual_seed(0)
    router = build_router(RouterConfig(renormalize=True, scale=scale), 8, 6, 2, 0).double()
    router.initialize(0, 0, 1.0)
    x_TD = torch.randn(12, 8, dtype=torch.float64, requires_grad=True)
    balance = BalanceConfig(**coefficients)  # type: ignore[arg-type]
    routing = router(x_TD, EMPTY_CONTEXT, SHAPE)
    assert routing.loss_logit_TE is not None
    fast = parts(routing, balance, routing.weight_TK)
    rule = (routing.logit_TE, routing.score_TE, routing.expert_TK, router.config)
    slow = parts(replace(routing), balance, combine_weights(*rule))
    upstream = [torch.randn_like(part) for part in slow]
    for got, expected in zip(fast, slow, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    inputs = (x_TD, router.weight)
    found, wanted = (
        torch.autograd.grad(results, inputs, upstream, retain_graph=True)
        for results in (fast, slow)
    )
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_a_weight_of_an_expert_that_is_given_twice_has_the_gradient_of_both() -> None:
    logit_TE = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    expert_TK = torch.tensor([[1, 1]] * 5)
    score_TE, config = logit_TE.softmax(-1), RouterConfig(renormalize=True)
    weights = (
        renormalized_softmax(logit_TE, score_TE, expert_TK)[0],
        combine_weights(logit_TE, score_TE, expert_TK, config),
    )
    upstream = torch.randn(5, 2, dtype=torch.float64)
    got, expected = (torch.autograd.grad(w, logit_TE, upstream, retain_graph=True) for w in weights)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_a_layer_counts_its_choices_once_and_keeps_its_ranges() -> None:
    """The sort by expert has counted them; after evaluation the ranges serve training too."""
    layer = MoE(8, 8, 5, 2)
    with torch.inference_mode():
        layer(torch.randn(20, 8))
    x = torch.randn(12, 8, requires_grad=True)
    output = layer(x)
    output.y.sum().backward()
    expected = torch.bincount(output.routing.expert_TK.flatten(), minlength=5)
    assert torch.equal(output.routing.counts.by_units[1][0], expected)
    assert output.routing.choice_count() is output.routing.counts.by_units[1]
    assert torch.equal(output.stats.choice_E, expected)
    assert (float(output.stats.dropped_weight), int(output.stats.fully_dropped_tokens)) == (0, 0)
    kept = dict(layer.ranges.longest)
    layer(x)
    assert all(layer.ranges.longest[key] is kept[key] for key in kept)


def test_the_counts_of_other_ids_are_not_the_routings() -> None:
    """A sort of renumbered experts (chunks) was noted as the layer's counts: the balance bias moved
    by the counts of other experts, with every gradient right."""
    layer = MoE(8, 8, 6, 2)
    output = layer(torch.randn(20, 8))
    routing = replace(output.routing)
    plan = dropless_plan(routing)
    other_TK = 5 - plan.expert_TK
    for other in (
        replace(plan, expert_TK=other_TK),
        replace(plan, keep_TK=torch.zeros_like(other_TK, dtype=torch.bool)),
        to_physical_experts(replace(plan, num_zero_cost=2), layer.placement),
    ):
        packed_permutation(other)
        assert not routing.counts.by_units
    packed_permutation(plan)
    assert torch.equal(routing.counts.by_units[1], output.routing.counts.by_units[1])


def test_constants_are_made_again_where_they_are_not_what_they_were() -> None:
    """A layer that ran once under a FakeTensorMode raised in every later forward; and a caller who
    summed `stats.fully_dropped_tokens` in place moved row 0 of every later permutation: a count is
    memory of its own now (`test_own_memory.py`)."""
    layer, constant, cpu = MoE(8, 8, 5, 2), HostConstant([3, 1]), torch.device("cpu")
    with FakeTensorMode():
        assert isinstance(layer.ranges.get(60, cpu), FakeTensor)
        assert isinstance(constant.on(cpu), FakeTensor)
        assert layer.ranges.get(60, cpu).shape == (60,)
    assert constant.on(cpu).tolist() == [3, 1]
    x = torch.randn(30, 8)
    first = layer(x)
    for inference in (False, True):
        with torch.inference_mode(inference):
            stats = layer(x).stats
            stats.fully_dropped_tokens.add_(5)
            stats.dropped_weight.add_(5.0)
        again = layer(x)
        assert torch.equal(again.y, first.y)
        assert (float(again.stats.dropped_weight), int(again.stats.fully_dropped_tokens)) == (0, 0)


def test_autocast_leaves_the_losses_and_their_gradients_as_they_are() -> None:
    """Batched products are in its list: they would be computed in bf16."""
    torch.manual_seed(0)
    router = build_router(RouterConfig(renormalize=True), 8, 6, 2, 0)
    router.initialize(0, 0, 1.0)
    x_TD, balance = torch.randn(12, 8), BalanceConfig(switch=0.1, z=0.1)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            routing = router(x_TD, EMPTY_CONTEXT, SHAPE)
            losses = parts(routing, balance, routing.weight_TK)[1:]
            gradient = torch.autograd.grad(losses, router.weight, [torch.ones(())] * 2)
        results.append([*losses, *gradient])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
