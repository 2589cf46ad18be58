"""Routings with experts to fall back on, built by hand."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st

from dmoe.moe.routing import Routing
from tests.moe.strategies import random_routing


def with_next_experts(routing: Routing, count: int, seed: int = 0, holes: bool = True) -> Routing:
    """Add `count` next experts in random order; with `holes`, the last are missing at random."""
    generator = torch.Generator().manual_seed(seed)
    tokens, num_experts = routing.score_TE.shape
    order_TE = torch.rand(tokens, num_experts, generator=generator).scatter(
        1, routing.expert_TK, -1.0
    )
    next_TK = order_TE.argsort(dim=1, descending=True)[:, :count].contiguous()
    if holes:
        there_T1 = torch.randint(0, count + 1, (tokens, 1), generator=generator)
        next_TK = next_TK.masked_fill(torch.arange(count) >= there_T1, -1)
    weight_TK = torch.rand(tokens, count, generator=generator, dtype=routing.weight_TK.dtype) + 0.1
    return replace(routing, next_expert_TS=next_TK, next_weight_TS=weight_TK)


def crowded_routing(seed: int) -> Routing:
    """Many tokens, few experts: next experts that are partly full, rare in small random cases."""
    return with_next_experts(
        random_routing(96, 6, 2, seed, levels=20, hot=seed % 6, masked=0.1), 3, seed
    )


@st.composite
def next_choice_routings(draw: st.DrawFn, ranks: int | None = None) -> tuple[Routing, int]:
    """A routing with count, and a number of groups (or ranks) that divides its tokens."""
    groups = draw(st.integers(1, 4)) if ranks is None else ranks
    tokens = groups * draw(st.integers(0 if ranks else 1, 9))
    num_experts = draw(st.sampled_from([1, 2, 3, 5, 7, 12]))
    top_k = draw(st.integers(1, min(num_experts, 4)))
    seed = draw(st.integers(0, 2**20))
    routing = random_routing(
        tokens,
        num_experts,
        top_k,
        seed,
        levels=draw(st.sampled_from([1, 3, 1000])),
        hot=draw(st.none() | st.integers(0, num_experts - 1)),
        masked=draw(st.sampled_from([None, 0.0, 0.4, 1.0])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
    )
    return with_next_experts(
        routing, draw(st.integers(0, num_experts - top_k)), seed, draw(st.booleans())
    ), groups
