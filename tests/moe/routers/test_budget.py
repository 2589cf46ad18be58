"""Budget routing: who is taken, within what a token may spend."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dmoe.config.schema import RouterConfig
from dmoe.moe.routers.budget import BudgetRouter, allowance
from dmoe.moe.routing import BatchShape, TokenContext
from tests.moe.routers.cases import Case, cases, identity_router, pairs
from tests.moe.strategies import drawn
from tests.references.routers import budget_reference


@drawn
@given(
    case=cases(),
    budget=st.sampled_from([0.05, 0.3, 0.5, 0.77, 1.0]),
    min_weight=st.sampled_from([0.0, 0.1, 0.3]),
    given_late=st.booleans(),
    data=st.data(),
)
def test_equals_the_definition(
    case: Case, budget: float, min_weight: float, given_late: bool, data: st.DataObject
) -> None:
    work = data.draw(
        st.lists(
            st.sampled_from([0, 1, 2, 3, 10, 1000]),
            min_size=case.num_experts,
            max_size=case.num_experts,
        )
    )
    own = {} if given_late else {"budget": budget}
    config = RouterConfig("budget", renormalize=False, min_weight=min_weight, scale=1.5, **own)
    router = identity_router(config, case)
    router.set_expert_costs(work)
    routing, got = pairs(router, case, **({"budget": budget} if given_late else {}))
    for t, logits in enumerate(case.logit_TE.tolist()):
        scores = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
        assume(
            all(abs(score - min_weight) > 1e-6 for score in scores)
        )  # there, rounding may decide
        taken = budget_reference(scores, case.bias_E.tolist(), work, budget, min_weight, case.top_k)
        expected = {e: 1.5 * scores[e] for e in taken} if case.valid[t] else {}
        assert got[t] == pytest.approx(expected, rel=1e-5)
        assert sum(work[e] for e in got[t]) <= budget * sum(work) * (1 + 1e-9)
        left_out = (
            routing.weight_TK[t][~routing.selected_TK[t]] if case.valid[t] else torch.zeros(0)
        )
        assert not left_out.any(), "what was not taken weighs nothing"


def taken(probabilities: list[float], work: list[int], **options: float) -> list[int]:
    logit_TE = torch.tensor([probabilities], dtype=torch.float64).log()
    case = Case(logit_TE, torch.zeros(len(probabilities)), None, len(probabilities))
    router = identity_router(RouterConfig("budget", renormalize=False, **options), case)  # type: ignore[arg-type]
    router.set_expert_costs(work)
    return list(pairs(router, case)[1][0])


def test_by_descending_weight_what_fits() -> None:
    """Example: minimum weight 0.1, budget half of the cost of all three experts."""
    assert taken([0.5, 0.3, 0.2], [1, 5, 4], budget=0.5) == [0, 2], (
        "expert 1 does not fit the 4 left, the lighter expert 2 does"
    )
    assert taken([0.5, 0.3, 0.2], [1, 5, 4], budget=0.6) == [0, 1]
    assert taken([0.2, 0.3, 0.5], [1, 5, 4], budget=0.5) == [2, 0]
    assert taken([0.5, 0.45, 0.05], [1, 1, 1]) == [0, 1], "0.05 is not above 0.1"
    assert taken([0.5, 0.3, 0.2], [1, 5, 4], min_weight=0.6) == [], (
        "nothing: the residual stream carries the token"
    )
    assert taken([0.5, 0.3, 0.2], [10, 5, 0], budget=0.1) == [2], "what costs nothing always fits"


@pytest.mark.parametrize("experts", [3, 7, 10, 49, 1000])
def test_a_budget_of_one_lets_everything_run_and_decimal_shares_are_exact(experts: int) -> None:
    """Exact where floats are not: 49 * (1/49) < 1, and 0.29 * 100 = 28.999999999999996."""
    assert allowance(1.0, [1] * experts) == experts
    assert allowance(0.29, [1] * 100) == 29
    assert allowance(0.7, [123457] * 10) == 7 * 123457
    assert allowance(0.5, [1, 2]) == 1


def test_a_sequence_goes_one_way_and_padding_has_no_say() -> None:
    router = BudgetRouter(
        RouterConfig("budget", renormalize=False, per="sequence"), 4, 4, 2
    ).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    valid_T = torch.tensor([True, True, True, True, True, False])
    routing = router(x, TokenContext(valid_T=valid_T), BatchShape(2))
    for own, real in ((slice(0, 3), slice(0, 3)), (slice(3, 6), slice(3, 5))):
        torch.testing.assert_close(routing.logit_TE[own], x[real].mean(0).expand(3, 4))
        assert len({tuple(row) for row in routing.expert_TK[own].tolist()}) == 1
    assert not routing.selected_TK[5].any()


def test_what_was_not_afforded_sends_no_gradient() -> None:
    case = Case(torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log(), torch.zeros(3), None, 3)
    router = identity_router(RouterConfig("budget", renormalize=False, budget=0.4), case)
    router.set_expert_costs([1, 8, 7])
    routing, got = pairs(router, case)
    assert list(got[0]) == [0]
    routing.weight_TK.sum().backward()
    scores = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    expected_E = scores[0] * (
        torch.tensor([1.0, 0.0, 0.0]) - scores
    )  # of softmax's first entry alone
    torch.testing.assert_close(router.weight.grad, expected_E.unsqueeze(1) * case.logit_TE)
