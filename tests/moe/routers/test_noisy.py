"""Noisy top-k gating against Shazeer's equations, with the noise drawn again from its key."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmoe.config.schema import RouterConfig
from dmoe.moe.rng import generator
from dmoe.moe.routers import build_router
from dmoe.moe.routers.noisy import NoisyRouter
from dmoe.moe.routing import BatchShape, TokenContext
from tests.moe.strategies import drawn
from tests.references.routers import noisy_reference

DIM = 4


def noisy(num_experts: int, top_k: int, layer: int = 0) -> NoisyRouter:
    router = build_router(RouterConfig(kind="noisy"), DIM, num_experts, top_k, layer)
    assert isinstance(router, NoisyRouter)
    router = router.double()
    router.initialize(3, layer, 0.8)
    torch.nn.init.normal_(router.noise_weight, generator=torch.Generator().manual_seed(1))
    return router


def inputs(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(
        tokens, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def normals(sequences: int, length: int, num_experts: int, first: int, layer: int = 0) -> Tensor:
    drawn_ = [
        torch.randn(length, num_experts, generator=generator(7, "noise", 2, layer, first + b))
        for b in range(sequences)
    ]
    return torch.cat(drawn_).double()


@drawn
@given(
    num_experts=st.sampled_from([2, 3, 7, 12]),
    sequences=st.integers(1, 3),
    length=st.integers(0, 4),
    training=st.booleans(),
    data=st.data(),
)
def test_equals_the_equations(
    num_experts: int, sequences: int, length: int, training: bool, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(2, min(4, num_experts)))
    router = noisy(num_experts, top_k).train(training)
    x_TD = inputs(sequences * length, data.draw(st.integers(0, 1000)))
    routing = router(x_TD, TokenContext(noise_key=(7, 2), first_sequence=5), BatchShape(sequences))
    normal_TE = (
        normals(sequences, length, num_experts, 5)
        if training
        else torch.zeros(len(x_TD), num_experts)
    )
    for t, x in enumerate(x_TD.tolist()):
        kept, weights = noisy_reference(
            x, router.weight.tolist(), router.noise_weight.tolist(), normal_TE[t].tolist(), top_k
        )
        assert routing.expert_TK[t].tolist() == kept
        assert routing.weight_TK[t].tolist() == pytest.approx(weights, rel=1e-9)
    assert routing.noise is not None
    torch.testing.assert_close(
        routing.logit_TE, routing.noise.clean_TE + normal_TE * routing.noise.std_TE
    )


def test_the_noise_does_not_depend_on_how_the_batch_is_cut() -> None:
    router, x_TD = noisy(6, 2), inputs(24)
    context = TokenContext(noise_key=(7, 2))
    whole = router(x_TD, context, BatchShape(6)).logit_TE
    for ranks in (2, 3, 6):
        part, count = 24 // ranks, 6 // ranks
        cut = [
            router(
                x_TD[r * part : (r + 1) * part],
                replace(context, first_sequence=r * count),
                BatchShape(count),
            ).logit_TE
            for r in range(ranks)
        ]
        torch.testing.assert_close(torch.cat(cut), whole, rtol=1e-12, atol=1e-12)
    again = router(x_TD, context, BatchShape(6)).logit_TE
    assert torch.equal(again, whole), "recomputation sees the same noise"


def test_the_noise_is_of_its_step_layer_sequence_and_seed() -> None:
    """x = 0, so that the logits are noise alone, of standard deviation softplus(0)."""
    logits = [
        noisy(6, 2, layer)(
            inputs(4) * 0, TokenContext(noise_key=key, first_sequence=first)
        ).logit_TE
        for layer, key, first in [
            (0, (7, 2), 0),
            (1, (7, 2), 0),
            (0, (8, 2), 0),
            (0, (7, 3), 0),
            (0, (7, 2), 1),
        ]
    ]
    for i, one in enumerate(logits):
        for two in logits[:i]:
            assert not bool((one == two).any())


def test_float32_and_float64_see_the_same_noise() -> None:
    x_TD = inputs(6)
    double, single = noisy(5, 2), noisy(5, 2).float()
    context = TokenContext(noise_key=(7, 2))
    torch.testing.assert_close(
        single(x_TD.float(), context).logit_TE.double(),
        double(x_TD, context).logit_TE,
        rtol=1e-5,
        atol=1e-5,
    )


def test_evaluation_has_no_noise_and_training_needs_a_key() -> None:
    router, x_TD = noisy(6, 2), inputs(3)
    with pytest.raises(
        ValueError, match=r"draws noise in training.*TokenContext\(noise_key=\(seed, step\)\).*eval"
    ):
        router(x_TD, TokenContext())
    routing = router.eval()(x_TD, TokenContext())
    torch.testing.assert_close(routing.logit_TE, x_TD @ router.weight.t())


def test_both_matrices_learn() -> None:
    router, x_TD = noisy(5, 2), inputs(6)
    value_TK = torch.randn(6, 2, dtype=torch.float64)

    def loss(weight: Tensor, noise_weight: Tensor) -> Tensor:
        named = {"weight": weight, "noise_weight": noise_weight}
        routing = torch.func.functional_call(router, named, (x_TD, TokenContext(noise_key=(7, 2))))
        return (routing.weight_TK * value_TK).sum()

    assert torch.autograd.gradcheck(loss, (router.weight, router.noise_weight))
    loss(router.weight, router.noise_weight).backward()
    assert bool(router.noise_weight.grad.any())  # type: ignore[union-attr]


def test_noise_starts_as_in_the_paper() -> None:
    router = build_router(RouterConfig(kind="noisy"), DIM, 5, 2, 0)
    router.initialize(0, 0, 0.02)
    routing = router(torch.randn(3, DIM), TokenContext(noise_key=(0, 0)))
    assert routing.noise.std_TE.unique().tolist() == [pytest.approx(0.6931, abs=1e-4)]
