"""A NaN, an infinity or fp16's maximum where nothing is read reaches nothing.

The story: masks were products. `0 x NaN` is NaN, so one NaN in a padding row made the router's
whole gradient NaN, and one in the first row of the dispatch order made the outputs of all tokens
with a dropped assignment NaN (14 of 16), since a dropped assignment gathered row 0 at weight 0.
Now values are selected: each test computes with clean values, puts poison where nothing is read,
and asks for the same bits everywhere else.

Letters: T tokens, D width, E experts, K experts per token, S next experts, R rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmoe import MoE
from dmoe.config.schema import BalanceConfig, CapacityConfig, ExpertsConfig, RouterConfig
from dmoe.moe.capacity import apply_capacity
from dmoe.moe.dispatch import packed_permutation, permute, unpermute
from dmoe.moe.experts.gated_fusion import gated_sum
from dmoe.moe.interfaces import NoComm
from dmoe.moe.load_balancing import auxiliary_losses
from dmoe.moe.padded_slots import padded_permutation
from dmoe.moe.routing import BatchShape, Noise, Routing, TokenContext
from tests.moe.layers import gradients, make, tokens_of
from tests.moe.strategies import drawn, limit_to, random_routing, routings
from tests.moe.threaded_ranks import run_threads

POISON = (float("nan"), float("inf"), float("-inf"), 65504.0)
poisons = st.sampled_from(POISON)
EXCHANGES = [("packed", None), ("packed", 0.7), ("padded", 0.7)]
KINDS = ("top_k", "noisy", "group_limited", "adaptive", "soft", "expert_choice", "budget")
VALID = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [False, True] * 3, [False] * 6])
NO_LOSS = BalanceConfig(switch=0.0, z=0.0)
ALL_LOSSES = {"switch": 0.1, "z": 0.1, "importance": 0.1, "usage_std": 0.1}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    """Equal bits, and none of them NaN."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def select_two(layer: MoE) -> None:
    """Make every token, finite or not, select experts 0 and 1 and have 2 and 3 as the next."""
    layer.router.get_buffer("bias_E")[:4] = torch.tensor([4e6, 3e6, 2e6, 1e6])


def options_of(kind: str) -> dict[str, Any]:
    more: dict[str, Any] = {
        "adaptive": {"k_min": 2},
        "group_limited": {"groups": 2, "topk_groups": 1},
        "expert_choice": {"allow_future_leak": True},
        "budget": {"per": "sequence", "renormalize": False, "allow_future_leak": True},
    }.get(kind, {})
    balance = ALL_LOSSES | ({"load": 0.1} if kind == "noisy" else {})
    top_k = 4 if kind == "soft" else 2
    return {
        "router": RouterConfig(kind=kind, **more),  # type: ignore[arg-type]
        "balance": BalanceConfig(**balance),  # type: ignore[arg-type]
        "num_experts": 4,
        "experts_per_token": top_k,
    }


@drawn
@given(
    kind=st.sampled_from(KINDS),
    exchange=st.sampled_from(EXCHANGES),
    poison=poisons,
    shared=st.integers(0, 1),
    upstream=st.booleans(),
)
def test_padding_reaches_nothing(
    kind: str, exchange: tuple[str, float | None], poison: float, shared: int, upstream: bool
) -> None:
    """Input or gradient of padding: the router, its losses, experts, shared experts."""
    if kind in ("expert_choice", "soft"):
        exchange = ("packed", None)  # they need a slot for every assignment
    context = TokenContext(valid_T=VALID.flatten(), noise_key=(0, 0))
    results = []
    for value in (0.5, poison):
        options = options_of(kind) | {"experts": ExpertsConfig(shared=shared)}
        layer = make(capacity=CapacityConfig(factor=exchange[1]), exchange=exchange[0], **options)
        x = tokens_of(4, 6).detach()
        x[~VALID] = value
        output = layer(x.requires_grad_(), context)
        grad_y = torch.linspace(-1, 1, output.y.numel(), dtype=output.y.dtype).view_as(output.y)
        grad_y[~VALID] = value if upstream else 0.0
        one = torch.ones((), dtype=torch.float64)
        torch.autograd.backward(
            [output.y, *output.aux.values()], [grad_y, *[one] * len(output.aux)]
        )
        found = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        assert x.grad is not None
        assert not output.y[~VALID].any()
        assert not x.grad[~VALID].any()
        stats = {"stats": output.stats.as_vector()}
        results.append(found | output.aux | stats | {"y": output.y, "x": x.grad})
    same(*results)


@drawn
@given(
    kind=st.sampled_from(("top_k", "noisy", "adaptive", "group_limited")),
    exchange=st.sampled_from(("packed", "padded")),
    score=st.sampled_from(("softmax", "sigmoid")),
    renormalize=st.booleans(),
    overflow=st.sampled_from(("drop", "next_choice")),
    poison=poisons,
)
def test_a_dropped_token_reaches_nothing(
    kind: str, exchange: str, score: str, renormalize: bool, overflow: str, poison: float
) -> None:
    """It lost its slots to earlier tokens; its logits' gradient is 0 x NaN in a plain backward."""
    more: dict[str, Any] = {"groups": 2, "topk_groups": 1} if kind == "group_limited" else {}
    router = RouterConfig(
        kind=kind,  # type: ignore[arg-type]
        score="softmax" if kind in ("noisy", "adaptive") else score,  # type: ignore[arg-type]
        **more,
    )
    limits = CapacityConfig(factor=0.5, renormalize=renormalize, overflow=overflow)  # type: ignore[arg-type]
    if kind == "adaptive":
        router = replace(router, k_min=2)
    results = []
    for value in (0.5, poison):
        layer = make(
            router=router,
            capacity=limits,
            exchange=exchange,
            num_experts=4,
            balance=NO_LOSS,
        )
        select_two(layer)
        x = tokens_of(1, 16).detach()
        x[0, 12:] = value
        output, gradient = gradients(layer, x.requires_grad_(), TokenContext(noise_key=(0, 0)))
        assert not output.plan.is_kept_TK[12:].any()
        assert output.plan.is_kept_TK[:4].all()
        assert not output.y[0, 12:].any()
        results.append(gradient | {"y": output.y, "x": gradient["x"]})
    same(*results)


@pytest.mark.parametrize("poison", [*POISON])
@pytest.mark.parametrize("exchange", ["packed", "padded"])
def test_a_token_that_is_not_finite_reaches_its_own_experts_only(
    exchange: str, poison: float
) -> None:
    """Token 0 has row 0, which every dropped assignment read at weight 0."""
    results = []
    for value in (0.5, poison):
        layer = make(
            capacity=CapacityConfig(factor=0.5),
            exchange=exchange,
            balance=NO_LOSS,
        )
        select_two(layer)
        x = tokens_of(1, 16).detach()
        x[0, 0] = value
        output = layer(x.requires_grad_())
        assert not output.plan.is_kept_TK[8:].any()
        output.y[0, 1:].sum().backward()
        assert x.grad is not None
        w_in = layer.experts.w_in.grad
        assert isinstance(w_in, Tensor)
        results.append({"y": output.y[0, 1:], "x": x.grad[0, 1:], "others": w_in[2:]})
    same(*results)


@drawn
@given(
    case=routings(), padded=st.booleans(), factor=st.sampled_from((0.3, 1.0, 3.0)), poison=poisons
)
def test_dropped_assignments_and_empty_slots_reach_nothing(
    case: tuple[Routing, int], padded: bool, factor: float, poison: float
) -> None:
    """Poison the weights of dropped assignments, and what experts returned for empty slots."""
    routing, groups = case
    plan = limit_to(routing, CapacityConfig(factor=factor), factor, groups)
    keep_TK = plan.is_kept_TK
    if padded:
        permutation = padded_permutation(plan)
    else:
        permutation, count_E = packed_permutation(plan)
        permutation = permutation.first_rows(int(count_E.sum()))
    results = []
    for value in (0.5, poison):
        generator = torch.Generator().manual_seed(0)
        x_TD = torch.randn(len(keep_TK), 3, generator=generator)
        x_TD[~keep_TK.any(1)] = value
        x_TD.requires_grad_()
        weight_TK = plan.weight_TK.float().masked_fill(~keep_TK, value).requires_grad_()
        rows_RD = permute(x_TD, permutation)
        empty_R1 = torch.zeros(len(rows_RD), 1, dtype=torch.bool)
        if permutation.filled_R is not None:
            empty_R1 = ~permutation.filled_R.unsqueeze(1)
        assert not rows_RD[empty_R1.squeeze(1)].any()
        out_RD = (rows_RD.detach() * 2).masked_fill(empty_R1, value).requires_grad_()
        y_TD = unpermute(out_RD, weight_TK, permutation)
        # a token without a kept assignment sends poison back
        grad_TD = torch.ones_like(y_TD).masked_fill(~keep_TK.any(1, keepdim=True), value)
        y_TD.backward(grad_TD)
        rows_RD.backward(torch.ones_like(rows_RD).masked_fill(empty_R1, value))
        assert x_TD.grad is not None
        assert weight_TK.grad is not None
        assert out_RD.grad is not None
        assert not weight_TK.grad[~keep_TK].any()
        assert not out_RD.grad[empty_R1.squeeze(1)].any()
        assert not y_TD[~keep_TK.any(1)].any()
        assert not x_TD.grad[~keep_TK.any(1)].any()
        results.append({"y": y_TD, "x": x_TD.grad, "weight": weight_TK.grad, "rows": out_RD.grad})
    same(*results)


@drawn
@given(
    seed=st.integers(0, 1000),
    renormalize=st.booleans(),
    factor=st.sampled_from((0.4, 0.8, 1.5)),
    poison=poisons,
)
def test_unused_next_choices_reach_nothing(
    seed: int, renormalize: bool, factor: float, poison: float
) -> None:
    """A next choice that is not taken: its weight is poison."""
    routing = random_routing(12, 6, 2, seed, masked=0.2)
    order_TE = routing.score_TE.scatter(1, routing.expert_TK, -1.0).argsort(1, descending=True)
    limits = CapacityConfig(factor=factor, overflow="next_choice", renormalize=renormalize)

    def run(next_TS: Tensor, limits: CapacityConfig) -> tuple[Tensor, Tensor, Tensor]:
        next_TS = next_TS.clone().requires_grad_()
        first_TK = routing.weight_TK.clone().requires_grad_()
        given = replace(
            routing, weight_TK=first_TK, next_expert_TS=order_TE[:, :2], next_weight_TS=next_TS
        )
        plan = limit_to(given, limits, factor, 1)
        (plan.weight_TK * torch.arange(1.0, 25.0).view(12, 2)).sum().backward()
        assert next_TS.grad is not None
        assert first_TK.grad is not None
        return plan.weight_TK, first_TK.grad, next_TS.grad

    clean_TS = routing.weight_TK * 0.5
    used_TS = run(clean_TS, replace(limits, renormalize=False))[2] != 0
    results = [run(one, limits) for one in (clean_TS, clean_TS.masked_fill(~used_TS, poison))]
    same(*[dict(zip(("weight", "first", "next"), one, strict=True)) for one in results])


def test_a_next_choice_far_above_the_selected_has_a_finite_gradient() -> None:
    """A bias selects an expert of low logit, so `exp(next - selected)` overflows, and 0 x inf."""
    layer = make(
        router=RouterConfig(weights_from="chosen", renormalize=False),
        capacity=CapacityConfig(factor=50.0, overflow="next_choice"),
        balance=NO_LOSS,
        num_experts=4,
    )
    select_two(layer)
    weight = layer.router.get_parameter("weight")
    with torch.no_grad():
        weight[:2], weight[2:] = -400.0, 400.0
    x = tokens_of(1, 4).detach().abs().requires_grad_()
    output, gradient = gradients(layer, x)
    assert output.plan.is_kept_TK.all()
    assert all(bool(value.isfinite().all()) for value in gradient.values())


@drawn
@given(poison=poisons, seed=st.integers(0, 100), level=st.sampled_from(("sequence", "global")))
def test_losses_of_a_router_of_ones_own(poison: float, seed: int, level: str) -> None:
    """Scores, logits and noise of padding may be anything: value and gradient are the same."""
    routing = random_routing(12, 5, 2, seed, masked=0.4)
    valid_T = routing.is_selected_TK[:, 0]
    balance = BalanceConfig(**ALL_LOSSES, load=0.1, switch_level=level)  # type: ignore[arg-type]
    results = []
    for value in (0.5, poison):
        tensors = [
            tensor.masked_fill(~valid_T.unsqueeze(1), value).requires_grad_()
            for tensor in (routing.score_TE, routing.logit_TE, routing.logit_TE, routing.score_TE)
        ]
        given = replace(
            routing, score_TE=tensors[0], logit_TE=tensors[1], noise=Noise(tensors[2], tensors[3])
        )
        losses = auxiliary_losses(
            given,
            balance,
            TokenContext(valid_T=valid_T),
            BatchShape(3),
            NoComm(),
            layer=0,
            micro_batches=2,
        )
        torch.stack(list(losses.values())).sum().backward()
        grads = {str(i): t.grad for i, t in enumerate(tensors) if t.grad is not None}
        results.append(losses | grads)
    same(*results)


@pytest.mark.parametrize("poison", POISON)
def test_copies_are_of_tokens_that_are_copied(poison: float) -> None:
    """The copy expert of a token that did not select it: `0 x token`."""
    results = []
    for value in (0.5, poison):
        layer = make(
            experts=ExpertsConfig(copy=1, constant=1),
            capacity=CapacityConfig(factor=0.3),
            num_experts=4,
            balance=NO_LOSS,
        )
        select_two(layer)
        x = tokens_of(1, 16).detach()
        x[0, 12:] = value
        output, gradient = gradients(layer, x.requires_grad_())
        assert not output.plan.is_kept_TK[12:].any()
        assert not output.y[0, 12:].any()
        results.append(gradient | {"y": output.y})
    same(*results)


@pytest.mark.parametrize("poison", POISON)
def test_a_missing_stream_has_no_part_in_a_gated_sum(poison: float) -> None:
    generator = torch.Generator().manual_seed(0)
    stream_TSW, gate_AX = torch.randn(5, 3, 2, generator=generator), torch.randn(6, 4)
    present_TS = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]]).bool()
    results = []
    for value in (0.5, poison):
        streams = stream_TSW.masked_fill(~present_TS.unsqueeze(-1), value).requires_grad_()
        gate = gate_AX.clone().requires_grad_()
        y_TW = gated_sum(streams, present_TS, gate, torch.zeros(4))
        y_TW.sum().backward()
        assert streams.grad is not None
        assert gate.grad is not None
        assert not streams.grad[~present_TS].any()
        results.append({"y": y_TW, "streams": streams.grad, "gate": gate.grad})
    same(*results)


@pytest.mark.parametrize("level", ["sequence", "micro_batch"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_unit_of_padding_alone_is_no_unit(level: str, world: int) -> None:
    """It halved the mean of two sequences; the mean is over real units, of all ranks."""
    routing = random_routing(16, 5, 2)
    valid_T = torch.tensor([True] * 4 + [False] * 4 + [True, False, False, True] + [False] * 4)
    kept = replace(routing, selected_TK=valid_T.unsqueeze(1).expand(-1, 2))
    balance = BalanceConfig(switch=0.1, z=0.1, switch_level=level)  # type: ignore[arg-type]

    def part(given: Routing, rows: slice) -> Routing:
        names = ("expert_TK", "weight_TK", "score_TE", "logit_TE", "selected_TK")
        return replace(given, **{name: getattr(given, name)[rows] for name in names})

    def losses(comm: Any, given: Routing, mask_T: Tensor, units: int) -> dict[str, Tensor]:
        each = len(mask_T) // comm.size
        rows = slice(comm.rank * each, (comm.rank + 1) * each)
        return auxiliary_losses(
            part(given, rows),
            balance,
            TokenContext(valid_T=mask_T[rows]),
            BatchShape(units // comm.size),
            comm,
            layer=0,
            micro_batches=units // comm.size,
        )

    got = run_threads(world, lambda comm: losses(comm, kept, valid_T, 4))
    real = torch.cat([torch.arange(4), torch.arange(8, 12)])
    names = ("expert_TK", "weight_TK", "score_TE", "logit_TE", "selected_TK")
    only = replace(kept, **{name: getattr(kept, name)[real] for name in names})
    expected = losses(NoComm(), only, valid_T[real], 2)
    for name, value in expected.items():
        assert float(sum(rank[name] for rank in got)) == pytest.approx(float(value), rel=1e-12)


def test_apply_capacity_without_a_capacity_zeroes_dropped_weights() -> None:
    routing = random_routing(9, 5, 2, masked=0.4)
    poisoned = routing.weight_TK.masked_fill(~routing.is_selected_TK, float("nan"))
    plan = apply_capacity(
        replace(routing, weight_TK=poisoned), BatchShape(), CapacityConfig(), NoComm()
    )
    assert not plan.weight_TK[~routing.is_selected_TK].any()
