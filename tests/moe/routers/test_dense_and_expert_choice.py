"""The two routers in which a token's row holds every expert: soft, and expert choice."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmoe.config.schema import RouterConfig
from dmoe.moe.capacity import expert_capacity
from dmoe.moe.routers.expert_choice import taken_tokens
from dmoe.moe.routing import BatchShape
from tests.moe.routers.cases import Case, cases, identity_router, pairs
from tests.moe.strategies import drawn
from tests.references.routers import expert_choice_reference, soft_reference


@drawn
@given(case=cases())
def test_soft_is_the_softmax_of_all(case: Case) -> None:
    case = Case(case.logit_TE, case.bias_E, case.valid_T, case.num_experts)
    _, got = pairs(identity_router(RouterConfig(kind="soft", scale=2.0), case), case)
    for t, logits in enumerate(case.logit_TE.tolist()):
        expected = (
            {e: 2.0 * w for e, w in enumerate(soft_reference(logits))} if case.valid[t] else {}
        )
        assert got[t] == pytest.approx(expected, rel=1e-5)


@drawn
@given(case=cases(), groups=st.integers(1, 3), capacity=st.none() | st.integers(1, 4))
def test_experts_choose_their_best_tokens(case: Case, groups: int, capacity: int | None) -> None:
    per_group = len(case.logit_TE) // groups
    valid_T = None if case.valid_T is None else case.valid_T[: groups * per_group]
    case = Case(case.logit_TE[: groups * per_group], case.bias_E * 0, valid_T, case.top_k)
    offered = None if capacity is None else min(capacity, per_group)
    config = RouterConfig(kind="expert_choice", allow_future_leak=True, scale=2.0)
    routing, got = pairs(
        identity_router(config, case), case, BatchShape(groups=groups, capacity=offered)
    )
    slots = (
        expert_capacity(1.0, per_group, case.top_k, case.num_experts, 1)
        if offered is None
        else offered
    )
    expected = expert_choice_reference(routing.score_TE.tolist(), case.valid, groups, slots)
    assert [(t, e) for t, row in enumerate(got) for e in sorted(row)] == expected
    for t, logits in enumerate(case.logit_TE.tolist()):
        scores = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
        assert got[t] == pytest.approx({e: 2.0 * scores[e] for e in got[t]}, rel=1e-5)
    real = [sum(case.valid[g * per_group : (g + 1) * per_group]) for g in range(groups)]
    count_E = routing.selected_TK.sum(0)
    assert count_E.tolist() == [sum(min(slots, r) for r in real)] * case.num_experts, (
        "the load is even by construction"
    )


def test_ties_go_to_the_earlier_token_and_padding_is_never_taken() -> None:
    valid_T = torch.tensor([False, True, True, True, False])
    taken_TE = taken_tokens(torch.full((5, 3), 1 / 3), valid_T, 1, 2)
    assert taken_TE.tolist() == [[False] * 3, [True] * 3, [True] * 3, [False] * 3, [False] * 3]
    assert (
        taken_tokens(torch.zeros(40, 1), None, 1, 7).flatten().tolist() == [True] * 7 + [False] * 33
    )


def test_main_loss_reaches_the_router() -> None:
    for kind, top_k in (("soft", 4), ("expert_choice", 2)):
        case = Case(torch.randn(6, 4, dtype=torch.float64), torch.zeros(4), None, top_k)
        config = RouterConfig(kind=kind, allow_future_leak=kind == "expert_choice")  # type: ignore[arg-type]
        router = identity_router(config, case)
        routing, _ = pairs(router, case)
        made = 1.0 if routing.selected_TK is None else routing.selected_TK
        (routing.weight_TK * made * torch.arange(4.0)).sum().backward()
        assert bool(router.weight.grad.any())
