"""`capacity.overflow: next_choice`: overflowed assignments get one further offer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from dmoe.config.schema import CapacityConfig
from dmoe.moe.capacity import apply_capacity
from dmoe.moe.interfaces import NoComm
from dmoe.moe.padded_slots import padded_permutation
from dmoe.moe.routing import BatchShape, DispatchPlan, Routing
from tests.moe.next_choice_cases import crowded_routing, next_choice_routings, with_next_experts
from tests.moe.strategies import drawn, limit_to, random_routing, slots
from tests.references.capacity import apply_capacity_reference

factors = st.sampled_from([0.1, 0.5, 1.0, 1.25, 2.0])
configs = st.builds(
    CapacityConfig,
    priority=st.sampled_from(["position", "score"]),
    group=st.sampled_from(["rank", "sequence"]),
    overflow=st.just("next_choice"),
    renormalize=st.booleans(),
)


crowds = [
    example(
        drawn_routing=(crowded_routing(seed), 3),
        config=CapacityConfig(priority=order, overflow="next_choice"),
        factor=1.0,
    )
    for seed, order in enumerate(["position", "score"] * 3)
]  # type: ignore[arg-type]


def with_crowds(test: Callable[..., None]) -> Callable[..., None]:
    for crowd in crowds:
        test = crowd(test)
    return test


@drawn
@with_crowds
@given(drawn_routing=next_choice_routings(), config=configs, factor=factors)
def test_second_chances_equal_the_walk(
    drawn_routing: tuple[Routing, int], config: CapacityConfig, factor: float
) -> None:
    routing, groups = drawn_routing
    plan = limit_to(routing, config, factor, groups)
    keep_TK, expert_TK = apply_capacity_reference(
        routing, config, groups, slots(routing, config, factor, groups)
    )
    assert plan.keep_TK is not None
    assert torch.equal(plan.keep_TK, keep_TK)
    assert torch.equal(plan.expert_TK, expert_TK)


@drawn
@with_crowds
@given(drawn_routing=next_choice_routings(), config=configs, factor=factors)
def test_slots_stay_unique_and_without_a_gap(
    drawn_routing: tuple[Routing, int], config: CapacityConfig, factor: float
) -> None:
    routing, groups = drawn_routing
    plan = limit_to(routing, config, factor, groups)
    assert plan.keep_TK is not None
    assert plan.slots is not None
    queues: dict[tuple[int, int], list[int]] = {}
    for t, k in plan.keep_TK.nonzero().tolist():
        queue = (t // (len(routing.expert_TK) // groups), int(plan.expert_TK[t, k]))
        queues.setdefault(queue, []).append(int(plan.slots.position_TK[t, k]))
    for taken in queues.values():
        assert sorted(taken) == list(range(len(taken)))
    filled_R = padded_permutation(plan).filled_R
    assert filled_R is not None
    assert int(filled_R.sum()) == int(plan.keep_TK.sum())


@drawn
@given(drawn_routing=next_choice_routings(), config=configs, factor=factors)
def test_weights_of_rerouted(
    drawn_routing: tuple[Routing, int], config: CapacityConfig, factor: float
) -> None:
    """The next expert's own weight replaces the old one; renormalized over all kept ones."""
    routing, groups = replace(drawn_routing[0], scale=1.5), drawn_routing[1]
    plan = limit_to(routing, config, factor, groups)
    assert plan.keep_TK is not None
    assert routing.next_expert_TS is not None
    assert routing.next_weight_TS is not None
    for t in range(len(routing.expert_TK)):
        expected = []
        for k in range(routing.expert_TK.shape[1]):
            expert, value = int(plan.expert_TK[t, k]), 0.0
            if plan.keep_TK[t, k]:
                spare = (routing.next_expert_TS[t] == expert).nonzero().flatten().tolist()
                value = float(
                    routing.next_weight_TS[t, spare[0]] if spare else routing.weight_TK[t, k]
                )
            expected.append(value)
        total = sum(expected)
        if config.renormalize and total:
            expected = [value / total * 1.5 for value in expected]
        assert plan.weight_TK[t].tolist() == pytest.approx(expected, rel=1e-6)


def by_hand(priority: str) -> DispatchPlan:
    """C = 2, five tokens on expert 0 with next experts 1, 1, 1, 1, 2; token 5 selects 1 first."""
    expert_TK = torch.tensor([[0], [0], [0], [0], [0], [1]])
    score_TE = torch.tensor(
        [
            [0.9, 0.1, 0.1],
            [0.8, 0.1, 0.1],
            [0.3, 0.2, 0.1],
            [0.2, 0.7, 0.1],
            [0.1, 0.1, 0.1],
            [0.1, 0.1, 0.1],
        ]
    )
    next_TK = torch.tensor([[1], [1], [1], [1], [2], [2]])
    routing = Routing(
        expert_TK,
        torch.ones(6, 1),
        score_TE,
        score_TE.log(),
        next_expert_TS=next_TK,
        next_weight_TS=torch.full((6, 1), 0.5),
    )
    config = CapacityConfig(overflow="next_choice", priority=priority)  # type: ignore[arg-type]
    return apply_capacity(routing, BatchShape(capacity=2), config, NoComm())


def test_position_by_hand() -> None:
    """Late are tokens 2, 3, 4; expert 1 has one slot left, which 2 gets by its place."""
    plan = by_hand("position")
    assert plan.keep_TK is not None
    assert plan.keep_TK[:, 0].tolist() == [True, True, True, False, True, True]
    assert plan.expert_TK[:, 0].tolist() == [0, 0, 1, 0, 2, 1]
    assert plan.weight_TK[:, 0].tolist() == [1.0, 1.0, 0.5, 0.0, 0.5, 1.0]


def test_score_by_hand() -> None:
    """The free slot goes to token 3 (score 0.7), behind the first round's token 5 (0.1)."""
    plan = by_hand("score")
    assert plan.keep_TK is not None
    assert plan.keep_TK[:, 0].tolist() == [True, True, False, True, True, True]
    assert plan.expert_TK[:, 0].tolist() == [0, 0, 0, 1, 2, 1]


def test_each_overflow_of_a_token_gets_a_spare_of_its_own() -> None:
    expert_TK = torch.tensor([[0, 1], [0, 1]])
    next_TK, next_weight_TK = (
        torch.tensor([[2, 3], [3, 2]]),
        torch.tensor([[0.3, 0.4], [0.5, 0.6]]),
    )
    score_TE = torch.full((2, 4), 0.25)
    routing = Routing(
        expert_TK,
        torch.ones(2, 2),
        score_TE,
        score_TE,
        next_expert_TS=next_TK,
        next_weight_TS=next_weight_TK,
    )
    plan = apply_capacity(
        routing, BatchShape(capacity=1), CapacityConfig(overflow="next_choice"), NoComm()
    )
    assert plan.expert_TK.tolist() == [[0, 1], [3, 2]]
    torch.testing.assert_close(plan.weight_TK, torch.tensor([[1.0, 1.0], [0.5, 0.6]]))


def test_an_offer_is_made_once() -> None:
    """With C = 1 the third token is dropped although expert 2 is free."""
    score_TE = torch.full((3, 3), 1 / 3)
    next_TK = torch.tensor([[1, 2]] * 3)
    routing = Routing(
        torch.zeros(3, 1, dtype=torch.int64),
        torch.ones(3, 1),
        score_TE,
        score_TE,
        next_expert_TS=next_TK,
        next_weight_TS=torch.ones(3, 2),
    )
    plan = apply_capacity(
        routing, BatchShape(capacity=1), CapacityConfig(overflow="next_choice"), NoComm()
    )
    assert plan.keep_TK is not None
    assert plan.keep_TK[:, 0].tolist() == [True, True, False]


def test_gradient_reaches_the_spares_that_are_used() -> None:
    routing = with_next_experts(random_routing(12, 5, 2, hot=0), 3, holes=False)
    assert routing.next_weight_TS is not None
    weight_TK, next_weight_TK = (
        routing.weight_TK.clone().requires_grad_(),
        routing.next_weight_TS.clone().requires_grad_(),
    )
    routing = replace(routing, weight_TK=weight_TK, next_weight_TS=next_weight_TK)
    plan = limit_to(routing, CapacityConfig(overflow="next_choice"), 0.6, 1)
    plan.weight_TK.sum().backward()
    assert plan.keep_TK is not None
    moved_TK = plan.expert_TK != routing.expert_TK
    assert 0 < int(moved_TK.sum()) < int(plan.keep_TK.sum())
    assert weight_TK.grad is not None
    assert next_weight_TK.grad is not None
    assert torch.equal(weight_TK.grad, (plan.keep_TK & ~moved_TK).double())
    assert int(next_weight_TK.grad.sum()) == int(moved_TK.sum())


def test_a_router_without_an_order_is_refused() -> None:
    with pytest.raises(ValueError, match="next_choice"):
        limit_to(random_routing(6, 4, 2), CapacityConfig(overflow="next_choice"), 1.0, 1)


def test_where_nothing_overflows_next_choice_is_drop() -> None:
    routing = with_next_experts(random_routing(12, 5, 2, seed=4), 3)
    one, two = (
        limit_to(routing, CapacityConfig(overflow=o), 50.0, 2) for o in ("drop", "next_choice")
    )  # type: ignore[arg-type]
    for name in ("expert_TK", "weight_TK", "keep_TK"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert torch.equal(one.slots.position_TK, two.slots.position_TK)
