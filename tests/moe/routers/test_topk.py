"""Learned routers: the bias affects the selection only, next experts, keyed jitter."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmoe.config.schema import RouterConfig
from dmoe.moe.routers import build_router
from dmoe.moe.routing import BatchShape, TokenContext
from tests.moe.routers.cases import Case, cases, identity_router, pairs
from tests.moe.strategies import drawn
from tests.references.routers import next_experts_reference, top_k_reference

CONFIGS = st.builds(
    RouterConfig,
    score=st.sampled_from(["softmax", "sigmoid"]),
    weights_from=st.sampled_from(["all", "chosen"]),
    renormalize=st.booleans(),
    scale=st.sampled_from([1.0, 2.5]),
)


def learnable(config: RouterConfig, top_k: int) -> RouterConfig:
    """K = 1 leaves only the weights that are not 1 whatever the router says."""
    return replace(config, renormalize=False, weights_from="all") if top_k == 1 else config


@drawn
@given(case=cases(), config=CONFIGS)
def test_top_k_equals_the_formula(case: Case, config: RouterConfig) -> None:
    config = learnable(config, case.top_k)
    routing, got = pairs(identity_router(config, case), case)
    for t, logits in enumerate(case.logit_TE.tolist()):
        chosen, weights = top_k_reference(logits, case.bias_E.tolist(), config, case.top_k)
        assert routing.expert_TK[t].tolist() == chosen
        expected = dict(zip(chosen, weights, strict=True)) if case.valid[t] else {}
        assert got[t] == pytest.approx(expected, rel=1e-5)
    assert routing.score_TE.dtype == torch.promote_types(case.logit_TE.dtype, torch.float32)


@drawn
@given(case=cases(), config=CONFIGS)
def test_spares_are_the_next_in_line(case: Case, config: RouterConfig) -> None:
    config = learnable(config, case.top_k)
    routing, _ = pairs(identity_router(config, case), case, BatchShape(capacity=3))
    spares = min(case.top_k, case.num_experts - case.top_k)
    assert (
        routing.next_expert_TS.shape == routing.next_weight_TS.shape == (len(case.logit_TE), spares)
    )
    for t, logits in enumerate(case.logit_TE.tolist()):
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
        if config.score == "softmax":
            scores = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
        biased = [s + b for s, b in zip(scores, case.bias_E.tolist(), strict=True)]
        chosen = routing.expert_TK[t].tolist()
        experts, weights = next_experts_reference(
            logits, scores, biased, chosen, range(case.num_experts), config, spares
        )
        assert routing.next_expert_TS[t].tolist() == experts
        assert routing.next_weight_TS[t].tolist() == pytest.approx(weights, rel=1e-5)


def test_without_a_capacity_there_is_no_spare() -> None:
    router = build_router(RouterConfig(), 4, 8, 2, 0)
    assert router(torch.ones(3, 4), TokenContext()).next_expert_TS is None


def test_the_bias_chooses_and_never_weighs() -> None:
    case = Case(
        torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64), torch.tensor([0.0, 0.0, 5.0]), None, 2
    )
    routing, (got,) = pairs(identity_router(RouterConfig(renormalize=False), case), case)
    assert routing.expert_TK.tolist() == [[2, 0]]
    torch.testing.assert_close(routing.weight_TK, case.logit_TE.softmax(1)[:, [2, 0]])
    assert routing.next_expert_TS is None
    assert set(got) == {0, 2}


@pytest.mark.parametrize("kind", ["top_k", "noisy", "adaptive"])
def test_spare_weights_carry_gradient(kind: str) -> None:
    router = build_router(RouterConfig(kind=kind, renormalize=False), 4, 6, 2, 0).double().eval()  # type: ignore[arg-type]
    router.initialize(0, 0, 1.0)
    router(
        torch.randn(5, 4, dtype=torch.float64), TokenContext(), BatchShape(capacity=4)
    ).next_weight_TS.sum().backward()
    assert bool(router.weight.grad.any())  # type: ignore[union-attr]


def test_the_bias_stays_float32_in_a_bf16_model() -> None:
    router = build_router(RouterConfig(), 4, 6, 2, 0)
    router.bias_E.fill_(0.501)  # type: ignore[operator, union-attr]
    router = router.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert router.bias_E.dtype == torch.float32
    assert router.bias_E.tolist() == [pytest.approx(0.501, abs=1e-7)] * 6  # type: ignore[operator, union-attr]
    assert router.double().bias_E.dtype == torch.float64
    assert "bias_E" in router.state_dict()
    router.initialize(0, 0, 1.0)
    assert not bool(router.bias_E.any())  # type: ignore[operator, union-attr]


def test_jitter_scales_the_input_within_its_bounds() -> None:
    case = Case(torch.ones(40, 5, dtype=torch.float64), torch.zeros(5), None, 2)
    router = identity_router(RouterConfig(jitter=0.2), case)
    logit_TE = router(case.logit_TE, TokenContext(noise_key=(0, 0))).logit_TE.detach()
    assert 0.8 <= float(logit_TE.min()) < 0.85
    assert 1.15 < float(logit_TE.max()) <= 1.2
    assert torch.equal(router.eval()(case.logit_TE, TokenContext()).logit_TE, case.logit_TE)


def test_jitter_without_a_key_is_refused() -> None:
    router = build_router(RouterConfig(jitter=0.1), 4, 6, 2, 0)
    with pytest.raises(ValueError, match=r"jitter in training.*noise_key=\(seed, step\)"):
        router(torch.ones(2, 4), TokenContext())
