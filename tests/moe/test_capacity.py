"""Expert capacity against the walk over the queues, and its documented properties."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmoe.config.schema import CapacityConfig
from dmoe.moe.capacity import apply_capacity, expert_capacity
from dmoe.moe.interfaces import NoComm
from dmoe.moe.routing import BatchShape, Routing
from tests.moe.layers import make, tokens_of
from tests.moe.strategies import drawn, limit_to, random_routing, routings, slots
from tests.references.capacity import apply_capacity_reference

factors = st.sampled_from([0.1, 0.5, 1.0, 1.25, 2.0, 100.0])
configs = st.builds(
    CapacityConfig,
    min_capacity=st.integers(0, 2),
    priority=st.sampled_from(["position", "score"]),
    renormalize=st.booleans(),
)


@drawn
@given(drawn_routing=routings(), config=configs, factor=factors)
def test_survivors_equal_the_walk(
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
@given(drawn_routing=routings(), config=configs, factor=factors)
def test_slots_are_unique_and_in_range(
    drawn_routing: tuple[Routing, int], config: CapacityConfig, factor: float
) -> None:
    routing, groups = drawn_routing
    plan = limit_to(routing, config, factor, groups)
    assert plan.keep_TK is not None
    assert plan.slots is not None
    assert plan.slots.groups == groups
    per_group = len(routing.expert_TK) // groups
    places = [
        (t // per_group, int(routing.expert_TK[t, k]), int(plan.slots.position_TK[t, k]))
        for t, k in plan.keep_TK.nonzero().tolist()
    ]
    assert len(set(places)) == len(places)
    assert all(0 <= slot < plan.slots.capacity for _, _, slot in places)


@drawn
@given(drawn_routing=routings(), config=configs, factor=factors)
def test_weights_of_survivors(
    drawn_routing: tuple[Routing, int], config: CapacityConfig, factor: float
) -> None:
    routing = replace(drawn_routing[0], scale=1.5)
    plan = limit_to(routing, config, factor, drawn_routing[1])
    assert plan.keep_TK is not None
    for weights, kept, got in zip(
        routing.weight_TK.tolist(),
        plan.keep_TK.tolist(),
        plan.weight_TK.tolist(),
        strict=True,
    ):
        alive = [weight if keep else 0.0 for weight, keep in zip(weights, kept, strict=True)]
        if config.renormalize and any(kept):
            alive = [weight / sum(alive) * 1.5 for weight in alive]
        assert got == pytest.approx(alive, rel=1e-12, abs=1e-15)


@drawn
@given(
    hundredths=st.integers(1, 400),
    tokens=st.integers(0, 5000),
    top_k=st.integers(1, 8),
    num_experts=st.integers(8, 300),
    least=st.integers(0, 5),
)
def test_slots_formula_in_exact_arithmetic(
    hundredths: int, tokens: int, top_k: int, num_experts: int, least: int
) -> None:
    wanted = -((-Fraction(hundredths, 100) * top_k * tokens / num_experts) // 1)
    expected = min(tokens, max(least, int(wanted)))
    assert expert_capacity(hundredths / 100, tokens, top_k, num_experts, least) == expected


def test_dropless_keeps_the_same_tensors() -> None:
    routing = random_routing(6, 3, 2)
    plan = limit_to(routing, CapacityConfig(), None, 1)
    assert plan.expert_TK is routing.expert_TK
    assert plan.weight_TK is routing.weight_TK
    assert plan.keep_TK is routing.selected_TK is None
    assert plan.slots is None


def test_position_serves_first_choices_of_late_tokens_before_second_choices_of_early_ones() -> None:
    routing = replace(random_routing(3, 2, 2), expert_TK=torch.tensor([[1, 0], [1, 0], [0, 1]]))
    plan = limit_to(routing, CapacityConfig(), 2 / 3, 1)  # C = ceil(2/3 * 2 * 3 / 2) = 2
    assert plan.slots.capacity == 2
    assert plan.keep_TK is not None
    assert plan.keep_TK.tolist() == [[True, True], [True, False], [True, False]]


def test_score_serves_the_surest_and_ties_by_position() -> None:
    score_TE = torch.tensor([[0.2, 0.1], [0.9, 0.1], [0.5, 0.1], [0.5, 0.1]])
    routing = Routing(
        torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1), score_TE, score_TE.log()
    )
    plan = limit_to(routing, CapacityConfig(priority="score"), 1.0, 1)  # C = 2
    assert plan.keep_TK is not None
    assert plan.keep_TK[:, 0].tolist() == [False, True, True, False]


@pytest.mark.parametrize("priority", ["position", "score"])
def test_sequence_groups_do_not_see_each_other(priority: str) -> None:
    """With one group per sequence, drops do not depend on the split over calls (or ranks)."""
    config = CapacityConfig(priority=priority)
    routing = random_routing(4 * 6, 5, 2, seed=3, hot=1, masked=0.2)
    whole = limit_to(routing, config, 0.8, groups=4)
    assert whole.keep_TK is not None
    assert routing.selected_TK is not None
    assert (
        0 < int(whole.keep_TK.sum()) < int(routing.selected_TK.sum())
    )  # something is dropped, or nothing is tested
    for parts in (2, 4):
        for part in range(parts):
            rows = slice(part * 24 // parts, (part + 1) * 24 // parts)
            piece = limit_to(rows_of(routing, rows), config, 0.8, groups=4 // parts)
            assert piece.keep_TK is not None
            assert piece.slots is not None
            assert whole.slots is not None
            assert torch.equal(piece.keep_TK, whole.keep_TK[rows])
            kept = piece.keep_TK  # a slot means nothing where no choice was made
            assert torch.equal(piece.slots.position_TK[kept], whole.slots.position_TK[rows][kept])


def rows_of(routing: Routing, rows: slice) -> Routing:
    assert routing.selected_TK is not None
    return replace(
        routing,
        expert_TK=routing.expert_TK[rows],
        weight_TK=routing.weight_TK[rows],
        score_TE=routing.score_TE[rows],
        logit_TE=routing.logit_TE[rows],
        selected_TK=routing.selected_TK[rows],
    )


def test_padding_takes_no_slot() -> None:
    routing = random_routing(8, 4, 1, hot=2)
    valid_T = torch.tensor([False, True] * 4)
    plan = limit_to(
        replace(routing, selected_TK=valid_T.unsqueeze(1)), CapacityConfig(), 2.0, 1
    )  # C = 4: one for each real token
    assert plan.keep_TK is not None
    assert plan.keep_TK[:, 0].tolist() == valid_T.tolist()


def test_gradient_passes_survivors_only() -> None:
    routing = random_routing(6, 3, 2, hot=0)
    weight_TK = routing.weight_TK.clone().requires_grad_()
    plan = limit_to(replace(routing, weight_TK=weight_TK), CapacityConfig(), 0.5, 1)
    assert plan.keep_TK is not None
    assert not bool(plan.keep_TK.all())
    plan.weight_TK.sum().backward()
    assert weight_TK.grad is not None
    assert torch.equal(weight_TK.grad, plan.keep_TK.double())


@pytest.mark.parametrize("priority", ["position", "score"])
def test_no_tokens(priority: str) -> None:
    plan = limit_to(random_routing(0, 4, 2), CapacityConfig(priority=priority), 1.0, groups=3)
    assert plan.keep_TK is not None
    assert plan.keep_TK.shape == (0, 2)
    assert plan.slots.capacity == 0


@pytest.mark.parametrize("group", ["rank", "sequence", "global"])
def test_evaluation_has_a_factor_of_its_own(group: str) -> None:
    """Dropless by default; with a factor, the drops of training with that factor."""
    x = tokens_of(4, 6)

    def kept(training: bool, factor: float | None, eval_factor: float | None = None) -> Tensor:
        limits = CapacityConfig(factor=factor, eval_factor=eval_factor, group=group)  # type: ignore[arg-type]
        return make(capacity=limits).train(training)(x).stats.kept_E

    assert int(kept(False, 0.5).sum()) == int(kept(True, None).sum()) > int(kept(True, 0.5).sum())
    assert torch.equal(kept(False, 2.0, 0.5), kept(True, 0.5))
    assert torch.equal(kept(False, None, 0.5), kept(True, 0.5))


def test_equal_tokens_are_served_by_position_whatever_the_last_bit_says() -> None:
    """Tokens with equal scores but for the last bit are ties: the position decides.

    With `priority: score` that bit chose who was dropped, so in float64 four ranks dropped other
    tokens than one process.
    """
    score_TE = torch.tensor([[0.7, 0.3], [0.7 + 1e-16, 0.3]], dtype=torch.float64)
    assert score_TE[0, 0] != score_TE[1, 0]
    expert_TK = torch.tensor([[0], [0]])
    routing = Routing(expert_TK, score_TE[:, :1], score_TE, score_TE.log())
    config = CapacityConfig(factor=1.0, priority="score")
    plan = apply_capacity(routing, BatchShape(capacity=1), config, NoComm())
    assert plan.keep_TK is not None
    assert plan.keep_TK.tolist() == [[True], [False]]
