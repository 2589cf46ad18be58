"""What a layer reports of one forward, against a loop over the assignments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmoe.config.schema import CapacityConfig
from dmoe.moe.capacity import limit, slots_per_expert
from dmoe.moe.routing import Routing
from dmoe.moe.stats import measure
from tests.moe.drawing import drawn, random_routing, routings
from tests.moe.layers import gradients, make, tokens_of


@drawn
@given(drawn_routing=routings(), factor=st.sampled_from([None, 0.2, 0.7, 1.5]), renormalize=st.booleans())
def test_counts_equal_the_loop(drawn_routing: tuple[Routing, int], factor: float | None, renormalize: bool) -> None:
    chosen, groups = drawn_routing
    limited = limit(chosen, CapacityConfig(renormalize=renormalize), factor, groups)
    tokens, top_k = chosen.expert_TK.shape
    num_experts = chosen.score_TE.shape[1]
    choice, kept, dropped, total, lost = [0] * num_experts, [0] * num_experts, 0.0, 0.0, 0
    for t in range(tokens):
        made = [k for k in range(top_k) if chosen.keep_TK is None or bool(chosen.keep_TK[t, k])]
        alive = [k for k in made if limited.keep_TK is None or bool(limited.keep_TK[t, k])]
        lost += bool(made) and not alive
        for k in made:
            choice[int(chosen.expert_TK[t, k])] += 1
            kept[int(chosen.expert_TK[t, k])] += k in alive
            total += float(chosen.weight_TK[t, k])
            dropped += 0.0 if k in alive else float(chosen.weight_TK[t, k])

    stats = measure(chosen, limited)
    assert stats.choice_E.tolist() == choice
    assert stats.kept_E.tolist() == kept
    assert int(stats.lost_tokens) == lost
    assert float(stats.total_weight) == pytest.approx(total, rel=1e-12)
    assert float(stats.dropped_weight) == pytest.approx(dropped, rel=1e-12, abs=1e-15)
    slots = 0 if factor is None else groups * num_experts * slots_per_expert(factor, tokens // groups, top_k, num_experts, 1)
    assert stats.slots == slots
    scalars = [float(stats.dropped_weight), float(stats.total_weight), float(lost), float(slots)]
    assert stats.as_vector().tolist() == [*map(float, choice), *map(float, kept), *scalars]


def test_slots_bound_what_is_kept() -> None:
    limited = limit(chosen := random_routing(30, 4, 2, hot=1), CapacityConfig(), 1.0, 3)
    stats = measure(chosen, limited)
    assert 0 < int(stats.kept_E.sum()) <= stats.slots == 4 * 3 * 5


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
    assert not list(layer.buffers())
    assert not plain.stats.as_vector().requires_grad
