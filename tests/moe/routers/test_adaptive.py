"""Top-p routing: how many experts a token takes, and what they weigh."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dmoe.config.schema import RouterConfig
from dmoe.moe.routing import BatchShape
from tests.moe.routers.cases import Case, cases, identity_router, pairs
from tests.moe.strategies import drawn
from tests.references.routers import adaptive_reference, next_experts_reference


@drawn
@given(
    case=cases(),
    top_p=st.sampled_from([0.05, 0.31, 0.62, 0.87, 0.999]),
    weights_from=st.sampled_from(["all", "chosen"]),
    renormalize=st.booleans(),
    data=st.data(),
)
def test_equals_the_definition(
    case: Case, top_p: float, weights_from: str, renormalize: bool, data: st.DataObject
) -> None:
    k_min = data.draw(st.integers(1, case.top_k))
    if k_min == 1:
        weights_from, renormalize = "all", False
    config = RouterConfig(
        "adaptive", weights_from=weights_from, renormalize=renormalize, top_p=top_p, k_min=k_min, scale=1.5  # type: ignore[arg-type]
    )  # fmt: skip
    routing, got = pairs(identity_router(config, case), case, BatchShape(capacity=2))
    spares = min(case.top_k, case.num_experts - k_min)
    assert routing.next_expert_TS.shape[1] == spares
    for t, logits in enumerate(case.logit_TE.tolist()):
        scores = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
        chosen = adaptive_reference(scores, case.bias_E.tolist(), top_p, k_min, case.top_k)
        reached = [sum(scores[e] for e in chosen[:k]) for k in range(1, len(chosen) + 1)]
        assume(all(abs(value - top_p) > 1e-6 for value in reached))  # there, rounding may decide
        raw = [math.exp(logits[e]) / sum(math.exp(logits[c]) for c in chosen) for e in chosen]
        if weights_from == "all":
            raw = [scores[e] for e in chosen]
        total = sum(raw) if renormalize else 1.0
        expected = (
            {e: 1.5 * w / total for e, w in zip(chosen, raw, strict=True)} if case.valid[t] else {}
        )
        assert got[t] == pytest.approx(expected, rel=1e-5)
        assert routing.weight_TK[t, len(chosen) :].tolist() == [0.0] * (case.top_k - len(chosen))
        biased = [s + b for s, b in zip(scores, case.bias_E.tolist(), strict=True)]
        experts, weights = next_experts_reference(
            logits, scores, biased, chosen, range(case.num_experts), config, spares
        )
        assert routing.next_expert_TS[t].tolist() == experts
        assert routing.next_weight_TS[t].tolist() == pytest.approx(weights, rel=1e-5)


def number_taken(probabilities: list[float], **options: float) -> int:
    logit_TE = torch.tensor([probabilities], dtype=torch.float64).log()
    case = Case(logit_TE, torch.zeros(len(probabilities)), None, 3)
    config = RouterConfig("adaptive", renormalize=False, **options)  # type: ignore[arg-type]
    return len(pairs(identity_router(config, case), case)[1][0])


def test_sure_tokens_take_fewer() -> None:
    assert number_taken([0.7, 0.1, 0.1, 0.1], top_p=0.6) == 1
    assert number_taken([0.5, 0.2, 0.2, 0.1], top_p=0.6) == 2
    assert number_taken([0.3, 0.25, 0.25, 0.2], top_p=0.6) == 3
    assert number_taken([0.3, 0.25, 0.25, 0.2], top_p=1.0) == 3, "k_max"
    assert number_taken([0.7, 0.1, 0.1, 0.1], top_p=0.6, k_min=2) == 2
    assert number_taken([1.0, 0.0, 0.0, 0.0], top_p=1.0) == 1


def test_only_made_choices_send_gradient() -> None:
    case = Case(
        torch.tensor([[3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64),
        torch.zeros(4),
        None,
        2,
    )
    config = RouterConfig("adaptive", weights_from="chosen", renormalize=False, k_min=2)
    router = identity_router(config, case)
    routing, _ = pairs(router, case)
    (routing.weight_TK * torch.tensor([1.0, 2.0])).sum().backward()
    assert torch.isfinite(router.weight.grad).all()
    assert bool(router.weight.grad.any())
    router = identity_router(RouterConfig("adaptive", renormalize=False), case)
    routing, _ = pairs(router, case)
    assert routing.selected_TK.tolist() == [[True, False], [True, True]]
    (routing.weight_TK * torch.tensor([1.0, 2.0])).sum().backward()
    assert bool(router.weight.grad.any())
