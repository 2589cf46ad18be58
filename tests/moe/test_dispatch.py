"""Permutations against loops, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from dmoe.config.schema import CapacityConfig
from dmoe.moe.capacity import dropless_plan
from dmoe.moe.dispatch import (
    Permutation,
    packed_permutation,
    permute,
    unpermute,
)
from dmoe.moe.padded_slots import padded_permutation
from dmoe.moe.routing import DispatchPlan, Routing
from tests.moe.strategies import drawn, limit_to, random_routing, routings
from tests.references.dispatch import permute_reference, unpermute_reference

WIDTH = 3


def placement_of(plan: DispatchPlan, how: str) -> Permutation:
    if how == "padded":
        return padded_permutation(plan)
    placement, count_E = packed_permutation(plan)
    return placement.first_rows(int(count_E.sum()))


def placed(
    how: str, factor: float | None = 0.7, tokens: int = 10, **options: float
) -> tuple[DispatchPlan, Permutation]:
    plan = limit_to(random_routing(tokens, 5, 2, seed=4, **options), CapacityConfig(), factor, 2)  # type: ignore[arg-type]
    return plan, placement_of(plan, how)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@drawn
@given(
    drawn_routing=routings(),
    factor=st.sampled_from([None, 0.3, 1.0, 3.0]),
    how=st.sampled_from(["packed", "padded"]),
)
def test_equals_the_loops(
    drawn_routing: tuple[Routing, int], factor: float | None, how: str
) -> None:
    routing, groups = drawn_routing
    factor = 1.0 if how == "padded" and factor is None else factor
    plan = limit_to(routing, CapacityConfig(), factor, groups)
    placement = placement_of(plan, how)
    x_TD = torch.randn(len(routing.expert_TK), WIDTH, dtype=torch.float64)
    rows_RD = permute(x_TD, placement)
    assert torch.equal(rows_RD, permute_reference(x_TD, placement))
    made = torch.randn_like(rows_RD)
    close(
        unpermute(made, plan.weight_TK, placement),
        unpermute_reference(made, plan.weight_TK, placement),
    )


@drawn
@given(drawn_routing=routings(), factor=st.sampled_from([None, 0.3, 1.0]))
def test_packed_rows_are_grouped_by_expert_in_token_order(
    drawn_routing: tuple[Routing, int], factor: float | None
) -> None:
    routing, groups = drawn_routing
    plan = limit_to(routing, CapacityConfig(), factor, groups)
    placement, count_E = packed_permutation(plan)
    tokens, top_k = plan.expert_TK.shape
    kept = torch.ones(tokens, top_k, dtype=torch.bool) if plan.keep_TK is None else plan.keep_TK
    wanted = [
        (e, t * top_k + k)
        for e in range(plan.num_experts)
        for t in range(tokens)
        for k in range(top_k)
        if kept[t, k] and int(plan.expert_TK[t, k]) == e
    ]
    assert placement.first_rows(int(count_E.sum())).assignment_R.tolist() == [n for _, n in wanted]
    assert count_E.tolist() == [
        sum(e == expert for e, _ in wanted) for expert in range(plan.num_experts)
    ]
    assert [int(placement.row_TK.flatten()[n]) for _, n in wanted] == list(range(len(wanted)))


@drawn
@given(drawn_routing=routings(), factor=st.sampled_from([0.3, 1.0, 2.5]))
def test_padded_row_is_expert_group_slot(drawn_routing: tuple[Routing, int], factor: float) -> None:
    routing, groups = drawn_routing
    plan = limit_to(routing, CapacityConfig(), factor, groups)
    placement = padded_permutation(plan)
    assert plan.keep_TK is not None
    assert plan.slots is not None
    assert placement.filled_R is not None
    tokens, top_k = plan.expert_TK.shape
    expected = {}
    for t, k in plan.keep_TK.nonzero().tolist():
        group = t // (tokens // groups)
        row = (int(plan.expert_TK[t, k]) * groups + group) * plan.slots.capacity + int(
            plan.slots.position_TK[t, k]
        )
        expected[row] = t * top_k + k
        assert int(placement.row_TK[t, k]) == row
    assert len(placement.assignment_R) == plan.num_experts * groups * plan.slots.capacity
    assert placement.filled_R.nonzero().flatten().tolist() == sorted(expected)
    assert all(int(placement.assignment_R[row]) == n for row, n in expected.items())


CASES = [("packed", None), ("packed", 0.7), ("padded", 0.7), ("padded", 2.0)]


@pytest.mark.parametrize(("how", "factor"), CASES)
@pytest.mark.parametrize("options", [{}, {"masked": 0.3}, {"hot": 2}])
def test_gradcheck(how: str, factor: float | None, options: dict[str, float]) -> None:
    plan, placement = placed(how, factor, tokens=6, **options)
    x_TD = torch.randn(6, WIDTH, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: permute(x, placement), (x_TD,))
    rows_RD = torch.randn(
        len(placement.assignment_R), WIDTH, dtype=torch.float64, requires_grad=True
    )
    weight_TK = plan.weight_TK.clone().requires_grad_()
    assert gradcheck(lambda rows, weight: unpermute(rows, weight, placement), (rows_RD, weight_TK))


@pytest.mark.parametrize(("how", "factor"), CASES)
def test_gradients_equal_autograd_through_the_loops(how: str, factor: float | None) -> None:
    plan, placement = placed(how, factor, masked=0.2)
    gradients = []
    for fast in (True, False):
        x_TD = torch.randn(
            10, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        ).requires_grad_()
        weight_TK = plan.weight_TK.clone().requires_grad_()
        rows_RD = (permute if fast else permute_reference)(x_TD, placement)
        y_TD = (unpermute if fast else unpermute_reference)(rows_RD.sin(), weight_TK, placement)
        y_TD.square().sum().backward()
        gradients.append((y_TD, x_TD.grad, weight_TK.grad))
    for got, expected in zip(*gradients, strict=True):
        close(got, expected)


@pytest.mark.parametrize("how", ["packed", "padded"])
def test_everything_dropped(how: str) -> None:
    """Zeros come out, and the graph is whole: a rank with nothing to do still runs its backward."""
    plan, placement = placed(how, 1.0, masked=1.0)
    x_TD = torch.randn(10, WIDTH, dtype=torch.float64, requires_grad=True)
    weight_TK = plan.weight_TK.clone().requires_grad_()
    y_TD = unpermute(permute(x_TD, placement), weight_TK, placement)
    y_TD.sum().backward()
    for zero in (y_TD, x_TD.grad, weight_TK.grad):
        assert zero is not None
        assert not zero.any()
    assert y_TD.shape == x_TD.shape
    assert weight_TK.grad is not None
    assert weight_TK.grad.shape == weight_TK.shape


@pytest.mark.parametrize("how", ["packed", "padded"])
def test_no_tokens(how: str) -> None:
    plan, placement = placed(how, 1.0, tokens=0)
    x_TD = torch.randn(0, WIDTH, dtype=torch.float64, requires_grad=True)
    weight_TK = plan.weight_TK.clone().requires_grad_()
    y_TD = unpermute(permute(x_TD, placement), weight_TK, placement)
    y_TD.sum().backward()
    assert y_TD.shape == (0, WIDTH)
    assert x_TD.grad is not None
    assert weight_TK.grad is not None
    assert weight_TK.grad.shape == (0, 2)


def test_bf16_sum_is_taken_in_float32() -> None:
    """Eight rows of 1 and 2^-9: added one by one in bf16 every small one is lost."""
    plan = dropless_plan(replace(random_routing(1, 8, 8), weight_TK=torch.ones(1, 8)))
    placement, _ = packed_permutation(plan)
    rows_RD = torch.full((8, 4), 2.0**-9)
    rows_RD[placement.row_TK[0, 0]] = 1.0
    y_TD = unpermute(rows_RD.bfloat16(), plan.weight_TK, placement)
    assert y_TD.dtype == torch.bfloat16
    assert torch.equal(y_TD.float(), torch.full((1, 4), 1 + 7 * 2.0**-9).bfloat16().float())
