"""Given experts: their weights and gradients by the formula, one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dmoe.config.router_kinds import ROUTERS
from dmoe.config.schema import CapacityConfig, RouterConfig
from dmoe.moe.layer import MoE
from dmoe.moe.routers import build_router
from dmoe.moe.routers.replayed import choices, with_given_experts
from dmoe.moe.routing import ONE_SEQUENCE, DispatchPlan, TokenContext

T, D, E, K = 7, 5, 6, 3
GIVEN = torch.stack([torch.randperm(E, generator=torch.manual_seed(n))[:K] for n in range(T)])
FEWER = GIVEN.masked_fill(torch.arange(K) > torch.arange(T).unsqueeze(1) % K, -1)
CASES = {
    "top_k": {},
    "top_k of the chosen": {"weights_from": "chosen"},
    "top_k, sigmoid": {"score": "sigmoid", "scale": 2.5},
    "top_k as it is": {"renormalize": False, "scale": 0.5},
    "noisy": {},
    "group_limited": {"groups": 3, "topk_groups": 2},
    "adaptive": {"k_min": 2},
}


def naive_weights(logit_E: list[Tensor], experts: list[int], config: RouterConfig) -> list[Tensor]:
    """Return the weight of each expert of one token, by the definitions in semantics.md."""
    if config.score == "sigmoid":
        weights = [1 / (1 + (-logit_E[e]).exp()) for e in experts]
    else:
        over = experts if config.weights_from == "chosen" else range(len(logit_E))
        total = sum(logit_E[e].exp() for e in over)
        weights = [logit_E[e].exp() / total for e in experts]
    if config.renormalize:
        weights = [weight / sum(weights) for weight in weights]
    return [weight * config.scale for weight in weights]


@pytest.mark.parametrize("case", CASES)
def test_weights_and_gradients_of_given_experts(case: str) -> None:
    kind = case.split()[0].rstrip(",")
    given_TK = FEWER if kind == "adaptive" else GIVEN
    router = build_router(RouterConfig(kind=kind, **CASES[case]), D, E, K, 1).double()
    router.initialize(0, 1, 1.0)
    x_TD = torch.randn(T, D, dtype=torch.float64, generator=torch.manual_seed(0))
    given_LTK = torch.stack([torch.full_like(given_TK, 99), given_TK])
    context = TokenContext(noise_key=(0, 0), given_expert_LTK=given_LTK)
    routing = router(x_TD, context, ONE_SEQUENCE)
    found = with_given_experts(routing, context, 1, router.config)
    factor_TK = torch.randn(T, K, dtype=torch.float64, generator=torch.manual_seed(1))
    loss, expected = x_TD.new_zeros(()), x_TD.new_zeros(())
    for t in range(T):
        experts = [e for e in given_TK[t].tolist() if e >= 0]
        weights = naive_weights(list(routing.logit_TE[t]), experts, router.config)
        for k, weight in enumerate(weights):
            assert found.expert_TK[t, k] == experts[k]
            assert found.weight_TK[t, k].item() == pytest.approx(weight.item(), rel=1e-12)
            loss = loss + factor_TK[t, k] * found.weight_TK[t, k]
            expected = expected + factor_TK[t, k] * weight
        assert found.is_selected_TK[t].sum() == len(experts)
    grads = [
        torch.autograd.grad(value, router.weight, retain_graph=True)[0]
        for value in (loss, expected)
    ]
    assert grads[1].abs().max() > 1e-3
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
    plan = DispatchPlan(found.expert_TK, found.weight_TK, found.selected_TK, E)
    assert torch.equal(choices(found, plan, context)["choice_TK"].long(), given_TK)


def test_own_choices_given_back_change_nothing() -> None:
    """To the last bit, with a capacity: output, gradients, counts and the dropped assignments."""
    layer = MoE(D, 8, E, K, capacity=CapacityConfig(factor=1.0))
    layer.initialize(0, 1.0)
    x_TD = torch.randn(40, D, generator=torch.manual_seed(0), requires_grad=True)
    own = layer(x_TD)
    given = layer(x_TD, TokenContext(given_expert_LTK=own.routing.expert_TK.unsqueeze(0)))
    assert torch.equal(own.y, given.y)
    assert torch.equal(own.plan.is_kept_TK, given.plan.is_kept_TK)
    assert not own.plan.is_kept_TK.all()
    gradients = [
        torch.autograd.grad(out.y.square().sum(), layer.router.weight) for out in (own, given)
    ]
    assert torch.equal(*(g[0] for g in gradients))


def test_padding_is_not_routed() -> None:
    layer = MoE(D, 8, E, K)
    valid_T = torch.arange(T) < 4
    context = TokenContext(valid_T=valid_T, given_expert_LTK=GIVEN.unsqueeze(0))
    out = layer(torch.randn(T, D), context)
    counts = torch.bincount(GIVEN[:4].flatten(), minlength=E)
    assert torch.equal(out.stats.choice_E, counts)


def test_the_kinds_that_can_be_replayed_are_tested() -> None:
    tested = {case.split()[0].rstrip(",") for case in CASES}
    assert tested == {kind for kind, spec in ROUTERS.items() if spec.replayable}
    assert math.isclose(
        sum(w.item() for w in naive_weights([torch.tensor(1.0)] * 2, [0, 1], RouterConfig())), 1
    )
