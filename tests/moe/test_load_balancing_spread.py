"""Importance, load and usage_std against the papers' formulas in loops, and what they promise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmoe.config.schema import BalanceConfig
from dmoe.moe.interfaces import DataParallelComm, NoComm
from dmoe.moe.load_balancing import auxiliary_losses, coefficients
from dmoe.moe.load_balancing.losses import (
    importance_loss,
    load_loss,
    smooth_load,
    usage_std_loss,
)
from dmoe.moe.routing import BatchShape, Noise, Routing, TokenContext
from tests.moe.layers import close
from tests.moe.strategies import drawn, random_routing
from tests.moe.threaded_ranks import run_threads, split_over_ranks
from tests.references.load_balancing import (
    importance_reference,
    load_reference,
    switch_reference,
    usage_std_reference,
    z_reference,
)

ALL = BalanceConfig(switch=1.0, z=1.0, importance=1.0, load=1.0, usage_std=1.0)


def noisy(routing: Routing, seed: int = 0, std: float = 0.5) -> Routing:
    """The same routing with noise, its experts the K largest noisy logits."""
    generator = torch.Generator().manual_seed(seed)
    like = routing.logit_TE
    std_TE = torch.rand(like.shape, generator=generator, dtype=like.dtype) * std + 0.05
    clean_TE = like + std_TE * torch.randn(like.shape, generator=generator, dtype=like.dtype)
    expert_TK = like.sort(dim=1, descending=True, stable=True).indices[
        :, : routing.expert_TK.shape[1]
    ]
    return replace(routing, expert_TK=expert_TK, noise=Noise(clean_TE, std_TE))


@st.composite
def noisy_routings(draw: st.DrawFn) -> tuple[Routing, int]:
    """A noisy routing with ties, and a number of units that divides its tokens (maybe 0)."""
    units = draw(st.integers(1, 4))
    num_experts = draw(st.sampled_from([1, 2, 3, 5, 7, 12]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    routing = random_routing(
        units * draw(st.integers(0, 6)),
        num_experts,
        draw(st.integers(1, min(num_experts, 4))),
        draw(st.integers(0, 2**20)),
        levels=draw(st.sampled_from([1, 3, 1000])),
        masked=draw(st.sampled_from([None, 0.0, 0.4, 1.0])),
        dtype=dtype,
    )
    if draw(st.booleans()):  # scores of a bf16 router input: many ties
        rounded_TE = routing.score_TE.bfloat16().to(dtype)
        routing = replace(routing, score_TE=rounded_TE, logit_TE=rounded_TE.log())
    if draw(st.booleans()):  # one expert that is everybody's favourite
        hot_TE = routing.score_TE.clone()
        hot_TE[:, -1] = 50.0
        routing = replace(routing, score_TE=hot_TE, logit_TE=hot_TE.log())
    return noisy(routing, draw(st.integers(0, 99))), units


def valid_of(routing: Routing) -> Tensor | None:
    return None if routing.selected_TK is None else routing.selected_TK[:, 0]


def real_tokens(routing: Routing, units: int) -> list[list[int]]:
    valid_T, per_unit = valid_of(routing), len(routing.expert_TK) // units
    return [
        [t for t in range(u * per_unit, (u + 1) * per_unit) if valid_T is None or bool(valid_T[t])]
        for u in range(units)
    ]


@drawn
@given(drawn_routing=noisy_routings())
def test_losses_equal_the_loops(drawn_routing: tuple[Routing, int]) -> None:
    routing, units = drawn_routing
    valid_T, tokens = valid_of(routing), real_tokens(routing, units)
    assert routing.noise is not None
    noise, top_k = routing.noise, routing.expert_TK.shape[1]
    tolerance = (
        {"rel": 1e-4, "abs": 1e-6}
        if routing.score_TE.dtype == torch.float32
        else {"rel": 1e-10, "abs": 1e-13}
    )
    expected = [importance_reference(routing.score_TE, unit) for unit in tokens]
    assert importance_loss(routing.score_TE, valid_T, units).tolist() == pytest.approx(
        expected, **tolerance
    )
    expected = [usage_std_reference(routing.score_TE, unit) for unit in tokens]
    assert usage_std_loss(routing.score_TE, valid_T, units).tolist() == pytest.approx(
        expected, **tolerance
    )
    expected = [load_reference(routing.logit_TE, noise, top_k, unit) for unit in tokens]
    assert load_loss(routing, valid_T, units).tolist() == pytest.approx(expected, **tolerance)


@drawn
@given(drawn_routing=noisy_routings())
def test_gradients_are_finite_and_padding_has_none(drawn_routing: tuple[Routing, int]) -> None:
    routing, units = drawn_routing
    assert routing.noise is not None
    leaves = [
        value.clone().requires_grad_()
        for value in (
            routing.score_TE,
            routing.logit_TE,
            routing.noise.clean_TE,
            routing.noise.std_TE,
        )
    ]
    score_TE, logit_TE, clean_TE, std_TE = leaves
    routing = replace(routing, score_TE=score_TE, logit_TE=logit_TE, noise=Noise(clean_TE, std_TE))
    context = TokenContext(valid_T=valid_of(routing))
    losses = auxiliary_losses(
        routing, ALL, context, BatchShape(units), NoComm(), layer=0, micro_batches=units
    )
    sum(losses.values(), torch.zeros(())).backward()
    for leaf in leaves:
        if leaf.grad is not None:  # K = E: the load is certain, and nothing could change it
            assert bool(leaf.grad.isfinite().all())
            assert context.valid_T is None or not leaf.grad[~context.valid_T].any()


@drawn
@given(drawn_routing=noisy_routings(), level=st.sampled_from(["sequence", "micro_batch", "global"]))
def test_shares_of_different_ranks_sum_to_the_mean_over_all_units(
    drawn_routing: tuple[Routing, int], level: str
) -> None:
    """The ranks' shares sum to the loss of one process with as many virtual ranks."""
    routing, ranks = drawn_routing
    config = replace(ALL, switch_level=level)  # type: ignore[arg-type]
    valid_T = valid_of(routing)
    alone = auxiliary_losses(
        routing,
        config,
        TokenContext(valid_T=valid_T),
        BatchShape(ranks),
        NoComm(),
        layer=0,
        micro_batches=ranks,
    )
    assert routing.noise is not None
    pieces = split_over_ranks(routing, ranks)
    clean, std = (
        routing.noise.clean_TE.tensor_split(ranks),
        routing.noise.std_TE.tensor_split(ranks),
    )

    def share(comm: DataParallelComm) -> dict[str, Tensor]:
        piece = replace(pieces[comm.rank], noise=Noise(clean[comm.rank], std[comm.rank]))
        context = TokenContext(valid_T=valid_of(piece))
        return auxiliary_losses(
            piece, config, context, BatchShape(1), comm, layer=0, micro_batches=1
        )

    shares = run_threads(ranks, share)
    tolerance = 1e-4 if routing.score_TE.dtype == torch.float32 else 1e-12
    close({name: sum(share[name] for share in shares) for name in alone}, alone, tolerance)


@drawn
@given(drawn_routing=noisy_routings())
def test_switch_and_z_equal_their_references(drawn_routing: tuple[Routing, int]) -> None:
    routing, units = drawn_routing
    context = TokenContext(valid_T=valid_of(routing))
    losses = auxiliary_losses(
        routing, ALL, context, BatchShape(units), NoComm(), layer=0, micro_batches=units
    )
    tokens = real_tokens(routing, units)
    expected = sum(switch_reference(routing, unit) for unit in tokens) / units
    assert float(losses["switch"]) == pytest.approx(expected, rel=1e-5)
    expected = sum(z_reference(routing.logit_TE, unit) for unit in tokens) / units
    assert float(losses["z"]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_smooth_load_is_the_chance_to_be_chosen() -> None:
    """P(x, e) equals the frequency of e over 20000 new draws of its noise."""
    routing = noisy(random_routing(3, 5, 2, seed=8, levels=1000))
    assert routing.noise is not None
    chance_TE = smooth_load(routing.logit_TE, routing.noise, 2)
    generator = torch.Generator().manual_seed(0)
    for t in range(3):
        for e in range(5):
            drawn_NE = routing.logit_TE[t].repeat(20000, 1)
            normal_N = torch.randn(20000, generator=generator, dtype=torch.float64)
            drawn_NE[:, e] = routing.noise.clean_TE[t, e] + routing.noise.std_TE[t, e] * normal_N
            chosen = (drawn_NE.topk(2, dim=1).indices == e).any(1).double().mean()
            assert float(chance_TE[t, e]) == pytest.approx(float(chosen), abs=0.015)


def test_load_gradient() -> None:
    routing = noisy(random_routing(6, 5, 2, seed=2, levels=1000))
    assert routing.noise is not None
    leaves = [
        v.clone().requires_grad_()
        for v in (routing.logit_TE, routing.noise.clean_TE, routing.noise.std_TE)
    ]

    def loss(logit_TE: Tensor, clean_TE: Tensor, std_TE: Tensor) -> Tensor:
        return load_loss(
            replace(routing, logit_TE=logit_TE, noise=Noise(clean_TE, std_TE)), None, 2
        )

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("masked", [None, 0.4])
def test_importance_and_usage_gradients(masked: float | None) -> None:
    routing = random_routing(6, 5, 2, seed=2, levels=1000, masked=masked)
    score_TE, valid_T = routing.score_TE.clone().requires_grad_(), valid_of(routing)
    assert torch.autograd.gradcheck(lambda score: importance_loss(score, valid_T, 2), (score_TE,))
    assert torch.autograd.gradcheck(lambda score: usage_std_loss(score, valid_T, 2), (score_TE,))


def test_perfect_balance_costs_nothing_and_has_a_finite_gradient() -> None:
    score_TE = torch.full((8, 4), 0.25, dtype=torch.float64, requires_grad=True)
    assert float(importance_loss(score_TE, None, 1)) == 0.0
    usage = usage_std_loss(score_TE, None, 1)
    assert float(usage) == 0.0
    usage.sum().backward()
    assert score_TE.grad is not None
    assert bool((score_TE.grad == 0).all())


def test_collapse() -> None:
    """All tokens on one of E = 4 experts: CV^2 = E - 1 and std = sqrt(E - 1) / E."""
    score_TE = torch.eye(4, dtype=torch.float64)[torch.zeros(10, dtype=torch.int64)]
    assert float(importance_loss(score_TE, None, 1)) == pytest.approx(3.0)
    assert float(usage_std_loss(score_TE, None, 1)) == pytest.approx(3**0.5 / 4)


def test_noise_that_rounds_to_zero() -> None:
    """A noise of 0 (softplus in float32) gives the hard count and a finite gradient."""
    logit_TE = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [2.0, 0.0, 1.0]], requires_grad=True)
    std_TE = torch.zeros(3, 3, requires_grad=True)
    chance_TE = smooth_load(logit_TE, Noise(logit_TE, std_TE), 1)
    assert chance_TE.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    chance_TE.square().sum().backward()
    assert logit_TE.grad is not None
    assert bool(logit_TE.grad.isfinite().all())


def test_load_without_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="noisy"):
        load_loss(random_routing(6, 5, 2), None, 1)


def test_several_at_once_by_name() -> None:
    config = BalanceConfig(switch=0.0, z=0.0, importance=0.5, usage_std=0.25, bias=0.001)
    assert coefficients(config) == {"importance": 0.5, "usage_std": 0.25}
    routing = random_routing(6, 5, 2)
    assert list(
        auxiliary_losses(
            routing, config, TokenContext(), BatchShape(), NoComm(), layer=0, micro_batches=1
        )
    ) == list(coefficients(config))
