"""Every router in the whole layer: shapes, padding, groups, gradients, no host read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dmoe import MoE
from dmoe.config.router_kinds import kinds_where
from dmoe.config.schema import BalanceConfig, CapacityConfig
from dmoe.moe.routers import ROUTER_CLASSES, build_router
from dmoe.moe.routing import BatchShape, TokenContext
from tests.moe.layers import DIM, close, make, objective, tokens_of
from tests.moe.routers.cases import EVERY_KIND, known, options_of

LEARNED = kinds_where(learned=True)


def layer_of(kind: str, **options: Any) -> MoE:
    config, top_k = options_of(kind)
    return make(num_experts=6, experts_per_token=top_k, router=config, **options)


def test_the_registry_is_whole() -> None:
    assert set(EVERY_KIND) == set(ROUTER_CLASSES)


@pytest.mark.parametrize("exchange", ["packed", "padded"])
@pytest.mark.parametrize("factor", [None, 1.0, 1.25])
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_output_is_the_weighted_sum_of_the_kept(
    kind: str, factor: float | None, exchange: str
) -> None:
    if factor is None and exchange == "padded":
        exchange = "packed"
    layer = layer_of(kind, capacity=CapacityConfig(factor=factor), exchange=exchange)
    x = tokens_of(2, 6)
    output = layer(x, known(12))
    plan, x_TD = output.plan, x.flatten(0, 1)
    expected = torch.zeros(12, DIM, dtype=torch.float64)
    for t, experts in enumerate(plan.expert_TK.tolist()):
        for k, e in enumerate(experts):
            if plan.is_kept_TK[t, k]:
                one = x_TD[t] @ layer.experts.w_in[e]
                gate, up = one.chunk(2)
                expected[t] = expected[t] + plan.weight_TK[t, k] * (
                    (torch.nn.functional.silu(gate) * up) @ layer.experts.w_out[e]
                )
    close(output.y.flatten(0, 1), expected)
    objective(output).backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())
    for name, parameter in layer.router.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


@pytest.mark.parametrize("kind", LEARNED)
def test_the_main_loss_alone_reaches_the_router(kind: str) -> None:
    layer = layer_of(kind, balance=BalanceConfig(switch=0.0, z=0.0))
    output = layer(tokens_of(2, 6), known(12))
    (output.y * torch.arange(output.y.numel()).view_as(output.y)).sum().backward()
    for name, parameter in layer.router.named_parameters():
        assert bool(parameter.grad.any()), name


@pytest.mark.parametrize("kind", sorted(kinds_where(learned=False)))
def test_losses_of_a_router_without_parameters_are_measured_and_train_nothing(kind: str) -> None:
    layer = layer_of(kind)
    output = layer(tokens_of(2, 6), known(12))
    assert not output.aux["switch"].requires_grad
    assert not output.aux["z"].requires_grad
    share_E = output.stats.choice_E.double() / output.stats.choice_E.sum()
    close(float(output.aux["switch"]), 6 * float((share_E**2).sum()))
    assert float(output.aux["z"]) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("factor", [None, 1.0])
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_padding_is_never_routed(kind: str, factor: float | None) -> None:
    layer = layer_of(kind, capacity=CapacityConfig(factor=factor))
    valid_T = torch.tensor([True] * 4 + [False] * 2 + [True] * 5 + [False])
    output = layer(tokens_of(2, 6), replace(known(12), valid_T=valid_T))
    assert not output.plan.keep_TK[~valid_T].any()
    assert not output.y.flatten(0, 1)[~valid_T].any()
    nobody = layer(tokens_of(2, 6), replace(known(12), valid_T=torch.zeros(12, dtype=torch.bool)))
    assert not nobody.stats.choice_E.any()
    assert not nobody.y.any()


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_no_tokens(kind: str) -> None:
    config, top_k = options_of(kind)
    router = build_router(config, DIM, 6, top_k, 0).double()
    routing = router(torch.zeros(0, DIM, dtype=torch.float64), known(0))
    assert routing.expert_TK.shape == routing.weight_TK.shape
    assert routing.score_TE.shape == routing.logit_TE.shape == (0, 6)
    layer = layer_of(kind)
    assert layer(tokens_of(0, 6), known(0)).y.shape == (0, 6, DIM)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_fewer_tokens_than_choices_and_every_expert(kind: str) -> None:
    config, _ = options_of(kind)
    if kind == "group_limited":
        config = replace(config, topk_groups=3)
    router = build_router(config, DIM, 6, 6, 0).double()
    router.initialize(0, 0, 1.0)
    routing = router(tokens_of(1)[:, :], known(1))
    assert sorted(routing.expert_TK[0].tolist()) == list(range(6))


@pytest.mark.parametrize("capacity", [None, 4])
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_nothing_is_read_back(kind: str, capacity: int | None) -> None:
    """No host read: on the meta device, `.item()` or a mask of unknown size raises."""
    config, top_k = options_of(kind)
    with torch.device("meta"):
        router = build_router(config, DIM, 6, top_k, 0)
        router.initialize(0, 0, 0.02)
        number_T = torch.zeros(12, dtype=torch.int64)
        context = TokenContext(
            torch.ones(12, dtype=torch.bool), token_id_T=number_T, label_T=number_T, noise_key=(0, 0)
        )  # fmt: skip
        routing = router(
            torch.zeros(12, DIM, dtype=torch.bfloat16), context, BatchShape(2, 2, capacity)
        )
    assert routing.expert_TK.is_meta
    assert routing.expert_TK.shape == routing.weight_TK.shape
    assert routing.weight_TK.dtype == torch.float32


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_sequences_route_alike_alone_and_together(kind: str) -> None:
    """With each sequence its own group, no router sees more than a sequence."""
    layer = layer_of(kind, capacity=CapacityConfig(factor=1.0, group="sequence"))
    x = tokens_of(3, 4)
    label_T = torch.tensor([0, 1, 2]).repeat_interleave(4)
    context = replace(known(12), label_T=label_T)
    together = layer(x, context)
    for b in range(3):
        part = slice(4 * b, 4 * b + 4)
        alone = layer(
            x[b : b + 1],
            replace(
                context,
                label_T=label_T[part],
                token_id_T=context.token_id_T[part],
                first_sequence=b,
            ),  # type: ignore[index]
        )
        assert torch.equal(alone.routing.expert_TK, together.routing.expert_TK[part])
        assert torch.equal(alone.plan.keep_TK, together.plan.keep_TK[part])
        close(alone.y[0], together.y[b])


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_one_hot_expert(kind: str) -> None:
    """All tokens prefer expert 5; for static routers, all have the same label and token id."""
    layer = layer_of(kind, capacity=CapacityConfig(factor=1.0))
    if kind in LEARNED:
        with torch.no_grad():
            layer.router.weight[5] = 3.0
    x = tokens_of(1, 12).detach().abs().requires_grad_()
    number_T = torch.zeros(12, dtype=torch.int64)
    output = layer(x, replace(known(12), label_T=number_T, token_id_T=number_T))
    assert output.stats.kept_E.tolist() <= [12 if kind == "soft" else 4] * 6
    assert bool(torch.isfinite(output.y).all())
    objective(output).backward()
    assert bool(torch.isfinite(x.grad).all())
