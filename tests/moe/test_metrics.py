"""What a layer reports of one forward, against a loop over the assignments."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmoe.config.schema import CapacityConfig
from dmoe.moe.capacity import dropless_plan, expert_capacity
from dmoe.moe.metrics import decisions, layer_stats, router_metrics
from dmoe.moe.routing import Routing, TokenContext
from tests.moe.layers import gradients, make, tokens_of
from tests.moe.next_choice_cases import next_choice_routings
from tests.moe.strategies import drawn, limit_to, random_routing, routings, slots
from tests.references.capacity import apply_capacity_reference


@drawn
@given(
    drawn_routing=routings(),
    factor=st.sampled_from([None, 0.2, 0.7, 1.5]),
    renormalize=st.booleans(),
)
def test_counts_equal_the_loop(
    drawn_routing: tuple[Routing, int], factor: float | None, renormalize: bool
) -> None:
    routing, groups = drawn_routing
    plan = limit_to(routing, CapacityConfig(renormalize=renormalize), factor, groups)
    tokens, top_k = routing.expert_TK.shape
    num_experts = routing.score_TE.shape[1]
    choice, kept, dropped, total, lost = [0] * num_experts, [0] * num_experts, 0.0, 0.0, 0
    for t in range(tokens):
        made = [
            k
            for k in range(top_k)
            if routing.selected_TK is None or bool(routing.selected_TK[t, k])
        ]
        alive = [k for k in made if plan.keep_TK is None or bool(plan.keep_TK[t, k])]
        lost += bool(made) and not alive
        for k in made:
            choice[int(routing.expert_TK[t, k])] += 1
            kept[int(routing.expert_TK[t, k])] += k in alive
            total += float(routing.weight_TK[t, k])
            dropped += 0.0 if k in alive else float(routing.weight_TK[t, k])

    stats = layer_stats(routing, plan)
    assert stats.choice_E.tolist() == choice
    assert stats.kept_E.tolist() == kept
    assert int(stats.fully_dropped_tokens) == lost
    assert float(stats.total_weight) == pytest.approx(total, rel=1e-12)
    assert float(stats.dropped_weight) == pytest.approx(dropped, rel=1e-12, abs=1e-15)
    offered = (
        0
        if factor is None
        else groups * num_experts * expert_capacity(factor, tokens // groups, top_k, num_experts, 1)
    )
    assert stats.slots == offered
    scalars = [float(stats.dropped_weight), float(stats.total_weight), float(lost), float(offered)]
    assert stats.as_vector().tolist() == [*map(float, choice), *map(float, kept), *scalars]


def test_slots_bound_what_is_kept() -> None:
    plan = limit_to(routing := random_routing(30, 4, 2, hot=1), CapacityConfig(), 1.0, 3)
    stats = layer_stats(routing, plan)
    assert 0 < int(stats.kept_E.sum()) <= stats.slots == 4 * 3 * 5


@drawn
@given(
    drawn_routing=next_choice_routings(),
    factor=st.sampled_from([0.2, 0.7, 1.5]),
    priority=st.sampled_from(["position", "score"]),
)
def test_rerouted_rows_count_where_they_go(
    drawn_routing: tuple[Routing, int], factor: float, priority: str
) -> None:
    """Choices count at the router's expert, rows at the expert that computes them."""
    routing, groups = drawn_routing
    config = CapacityConfig(overflow="next_choice", priority=priority)  # type: ignore[arg-type]
    keep_TK, expert_TK = apply_capacity_reference(
        routing, config, groups, slots(routing, config, factor, groups)
    )
    tokens, top_k = routing.expert_TK.shape
    choice, kept, dropped, lost = (
        [0] * routing.score_TE.shape[1],
        [0] * routing.score_TE.shape[1],
        0.0,
        0,
    )
    for t in range(tokens):
        made = [
            k
            for k in range(top_k)
            if routing.selected_TK is None or bool(routing.selected_TK[t, k])
        ]
        lost += bool(made) and not keep_TK[t].any()
        for k in made:
            choice[int(routing.expert_TK[t, k])] += 1
            kept[int(expert_TK[t, k])] += bool(keep_TK[t, k])
            dropped += 0.0 if keep_TK[t, k] else float(routing.weight_TK[t, k])
    stats = layer_stats(routing, limit_to(routing, config, factor, groups))
    assert (stats.choice_E.tolist(), stats.kept_E.tolist(), int(stats.fully_dropped_tokens)) == (
        choice,
        kept,
        lost,
    )
    assert float(stats.dropped_weight) == pytest.approx(dropped, rel=1e-5, abs=1e-12)


def test_a_share_of_slots_is_not_rounded() -> None:
    """A third of 10 slots, three times, is 10; in float32 it would be 10.0000003."""
    stats = layer_stats(
        routing := random_routing(6, 5, 2, dtype=torch.float32),
        limit_to(routing, CapacityConfig(), 1.0, 1),
    )
    assert float(replace(stats, slots=10 / 3).as_vector()[-1]) == 10 / 3


def test_vectors_add_up_over_micro_batches() -> None:
    layer = make(capacity=CapacityConfig(factor=0.6, group="sequence"))
    x = tokens_of(4, 6)
    parts = layer(x[:1]).stats.as_vector() + layer(x[1:]).stats.as_vector()
    torch.testing.assert_close(layer(x).stats.as_vector(), parts, rtol=1e-12, atol=1e-12)


def test_recomputation_counts_once() -> None:
    """Stats are returned, not kept: torchtitan's counters double under activation checkpointing."""
    layer = make(capacity=CapacityConfig(factor=0.6))
    x = tokens_of(2, 6)
    plain, _ = gradients(layer, x)
    layer.zero_grad()
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    again.y.sin().sum().backward()
    assert torch.equal(again.stats.as_vector(), plain.stats.as_vector())
    assert [name for name, _ in layer.named_buffers()] == [
        "router.bias_E"
    ]  # the controller's, which a forward never writes
    assert not any(buffer.any() for buffer in layer.buffers())
    assert not plain.stats.as_vector().requires_grad


def test_nothing_is_observed_unless_asked_for() -> None:
    layer, x = make(), tokens_of(2, 6)
    assert layer(x).stats.metrics == layer(x, TokenContext()).stats.metrics == {}
    asked = layer(x, TokenContext(metrics_fn=router_metrics)).stats
    assert asked.metrics
    assert not any(value.requires_grad for value in asked.metrics.values())


def test_padding_is_not_observed() -> None:
    """Five real tokens and seven of padding are seen as those five alone."""
    layer, x = make(), tokens_of(12)
    valid_T = torch.arange(12) < 5
    for metrics_fn in (router_metrics, decisions):
        padded = layer(x, TokenContext(valid_T=valid_T, metrics_fn=metrics_fn)).stats.metrics
        alone = layer(x[:5], TokenContext(metrics_fn=metrics_fn)).stats.metrics
        for name, value in padded.items():
            if name.endswith("_TE"):
                assert not value[5:].any()
                value = value[:5]
            torch.testing.assert_close(value, alone[name], rtol=1e-12, atol=1e-12)


@drawn
@given(drawn_routing=routings())
def test_decisions_equal_the_loop(drawn_routing: tuple[Routing, int]) -> None:
    routing, _ = drawn_routing
    seen = decisions(routing, dropless_plan(routing), TokenContext())
    for t, experts in enumerate(routing.expert_TK.tolist()):
        made = experts if routing.selected_TK is None or bool(routing.selected_TK[t, 0]) else []
        assert seen["chosen_TE"][t].nonzero().flatten().tolist() == sorted(made)
        assert seen["first_TE"][t].nonzero().flatten().tolist() == made[:1]


def test_observers_read_no_value() -> None:
    """No host read on the meta device; a rank without tokens has logit_max 0."""
    empty = random_routing(0, 5, 2)
    assert router_metrics(empty, dropless_plan(empty), TokenContext())["logit_max"].tolist() == [
        0.0
    ]
    routing = random_routing(8, 5, 2, masked=0.4)
    assert routing.selected_TK is not None
    far = replace(
        routing,
        expert_TK=routing.expert_TK.to("meta"),
        weight_TK=routing.weight_TK.to("meta"),
        score_TE=routing.score_TE.to("meta"),
        logit_TE=routing.logit_TE.to("meta"),
        selected_TK=routing.selected_TK.to("meta"),
    )
    context = TokenContext(valid_T=torch.empty(8, dtype=torch.bool, device="meta"))
    assert router_metrics(far, dropless_plan(far), context)["made_K"].shape == (2,)
    assert decisions(far, far, context)["chosen_TE"].shape == (8, 5)
