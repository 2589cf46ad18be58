"""The top-k router: who is chosen, ties included, and with what weight."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmoe import MoE
from dmoe.config.schema import RouterConfig
from dmoe.moe.routers import TopKRouter
from dmoe.moe.routers.base import combine_weights, gate_scores, top_k_stable
from dmoe.moe.routers.projection import router_dtype
from dmoe.moe.routing import TokenContext
from tests.moe.strategies import drawn
from tests.references.routers import top_k_stable_reference


@drawn
@given(
    tokens=st.integers(0, 20),
    num_experts=st.sampled_from([1, 2, 3, 7, 64]),
    data=st.data(),
    levels=st.sampled_from([1, 2, 5, 1 << 20]),
    bf16=st.booleans(),
)
def test_choice_equals_the_loop(
    tokens: int, num_experts: int, data: st.DataObject, levels: int, bf16: bool
) -> None:
    """Scores rounded to bf16's 8 bits tie often."""
    top_k = data.draw(st.integers(1, num_experts))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    score_TE = torch.randint(0, levels, (tokens, num_experts), generator=generator).float() / levels
    if bf16:
        score_TE = score_TE.bfloat16().float()
    assert torch.equal(top_k_stable(score_TE, top_k), top_k_stable_reference(score_TE, top_k))


def test_ties_go_to_the_lower_expert() -> None:
    score_TE = torch.tensor([[0.2, 0.4, 0.2, 0.4, 0.2]]).repeat(
        40, 1
    )  # long enough for an unstable sort to show
    assert top_k_stable(score_TE, 5).tolist() == [[1, 3, 0, 2, 4]] * 40
    assert top_k_stable(torch.zeros(3, 100), 4).tolist() == [[0, 1, 2, 3]] * 3


def test_every_expert_can_be_chosen() -> None:
    chosen = top_k_stable(torch.rand(6, 5, generator=torch.Generator().manual_seed(0)), 5)
    assert chosen.sort(1).values.tolist() == [[0, 1, 2, 3, 4]] * 6


def expected_weights(logits: list[float], chosen: list[int], config: RouterConfig) -> list[float]:
    """The weights of one token, from the sentences of the semantics, in plain Python."""

    def softmax(values: list[float]) -> list[float]:
        exponentials = [math.exp(value) for value in values]
        return [value / sum(exponentials) for value in exponentials]

    if config.score == "sigmoid":
        weights = [1 / (1 + math.exp(-logits[e])) for e in chosen]
    elif config.weights_from == "all":
        weights = [softmax(logits)[e] for e in chosen]
    else:
        weights = softmax([logits[e] for e in chosen])
    if config.renormalize:
        weights = [weight / (sum(weights) + 1e-20) for weight in weights]
    return [weight * config.scale for weight in weights]


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("weights_from", ["all", "chosen"])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_weights_follow_the_formula(
    kind: str, weights_from: str, renormalize: bool, scale: float
) -> None:
    config = RouterConfig(
        score=kind, weights_from=weights_from, renormalize=renormalize, scale=scale
    )
    logit_TE = torch.randn(9, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    score_TE = gate_scores(logit_TE, config)
    expert_TK = top_k_stable(score_TE, 3)
    got = combine_weights(logit_TE, score_TE, expert_TK, config)
    expected = [
        expected_weights(row, chosen, config)
        for row, chosen in zip(logit_TE.tolist(), expert_TK.tolist(), strict=True)
    ]
    torch.testing.assert_close(
        got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


def test_renormalised_all_equals_chosen_for_softmax() -> None:
    """Mixtral's convention and Megatron's are the same number."""
    logit_TE = torch.randn(30, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    config = RouterConfig(renormalize=True)
    expert_TK = top_k_stable(gate_scores(logit_TE, config), 2)
    one = combine_weights(logit_TE, gate_scores(logit_TE, config), expert_TK, config)
    two = combine_weights(
        logit_TE,
        gate_scores(logit_TE, config),
        expert_TK,
        RouterConfig(weights_from="chosen", renormalize=False),
    )
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_one_renormalised_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"renormalize.*top_k=1"):
        MoE(8, 4, 4, 1)
    MoE(8, 4, 4, 1, router=RouterConfig(renormalize=False))


@pytest.mark.parametrize(
    ("top_k", "allowed"), [(0, "must be 1 or more"), (5, "must be at most num_experts=4")]
)
def test_impossible_top_k_is_refused(top_k: int, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"top_k={top_k}: {allowed}"):
        MoE(8, 4, 4, top_k)


@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (1, 3), (2, 4)])
def test_fewer_tokens_than_choices(tokens: int, top_k: int) -> None:
    router = TopKRouter(RouterConfig(), 8, 4, top_k)
    router.initialize(0, 0, 0.02)
    routing = router(torch.randn(tokens, 8), TokenContext())
    assert routing.expert_TK.shape == routing.weight_TK.shape == (tokens, top_k)
    torch.testing.assert_close(routing.weight_TK.sum(1), torch.ones(tokens))


@pytest.mark.parametrize(
    ("given_dtype", "dtype"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_router_never_computes_below_float32(given_dtype: torch.dtype, dtype: torch.dtype) -> None:
    router = TopKRouter(RouterConfig(), 8, 4, 2).to(given_dtype)
    router.initialize(0, 0, 0.02)
    x_TD = torch.randn(5, 8).to(given_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x_TD, TokenContext())
    assert (
        router_dtype(x_TD)
        == routing.logit_TE.dtype
        == routing.score_TE.dtype
        == routing.weight_TK.dtype
        == dtype
    )
    exact = x_TD.double() @ router.weight.double().t()
    torch.testing.assert_close(routing.logit_TE.double(), exact, rtol=1e-5, atol=1e-7)


def test_main_loss_reaches_the_router() -> None:
    router = TopKRouter(RouterConfig(), 8, 4, 2).double()
    router.initialize(0, 0, 1.0)
    x_TD = torch.randn(5, 8, dtype=torch.float64)
    value_TK = torch.randn(5, 2, dtype=torch.float64)

    def loss(weight: torch.Tensor) -> torch.Tensor:
        routing = torch.func.functional_call(router, {"weight": weight}, (x_TD, TokenContext()))
        return (routing.weight_TK * value_TK).sum()

    assert torch.autograd.gradcheck(loss, (router.weight,))
