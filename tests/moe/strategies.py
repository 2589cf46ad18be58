"""Random routings for tests: few score levels, so that ties are the rule, and awkward sizes.

Letters: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from dmoe.config.schema import CapacityConfig
from dmoe.moe.capacity import apply_capacity, expert_capacity
from dmoe.moe.interfaces import NoComm
from dmoe.moe.routing import BatchShape, DispatchPlan, Routing

drawn = settings(deadline=None, max_examples=60, derandomize=True, database=None)
"""The same examples in every run: a red test can be run again."""


def random_routing(
    tokens: int,
    num_experts: int,
    top_k: int,
    seed: int = 0,
    *,
    levels: int = 8,
    hot: int | None = None,
    masked: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Routing:
    """Draw K distinct experts per token, and scores of a few `levels`.

    `hot` is every token's first choice; `masked` is the share of padding.
    """
    generator = torch.Generator().manual_seed(seed)
    order_TE = torch.rand(tokens, num_experts, generator=generator)
    if hot is not None:
        order_TE[:, hot] = 2.0
    expert_TK = order_TE.argsort(dim=1, descending=True)[:, :top_k].contiguous()
    score_TE = (
        torch.randint(1, levels + 1, (tokens, num_experts), generator=generator).to(dtype) / levels
    )
    weight_TK = torch.rand(tokens, top_k, generator=generator, dtype=dtype) + 0.1
    keep_TK: Tensor | None = None
    if masked is not None:
        valid_T = torch.rand(tokens, generator=generator) >= masked
        keep_TK = valid_T.unsqueeze(1).expand(tokens, top_k)
    return Routing(expert_TK, weight_TK, score_TE, score_TE.log(), selected_TK=keep_TK)


@st.composite
def routings(draw: st.DrawFn) -> tuple[Routing, int]:
    """A routing and a number of groups that divides its tokens."""
    groups = draw(st.integers(1, 4))
    tokens = groups * draw(st.integers(1, 9))
    num_experts = draw(st.sampled_from([1, 2, 3, 5, 7, 12]))
    top_k = draw(st.integers(1, min(num_experts, 4)))
    hot = draw(st.none() | st.integers(0, num_experts - 1))
    masked = draw(st.sampled_from([None, 0.0, 0.4, 1.0]))
    levels = draw(st.sampled_from([1, 3, 1000]))
    seed = draw(st.integers(0, 2**20))
    return random_routing(
        tokens, num_experts, top_k, seed, levels=levels, hot=hot, masked=masked
    ), groups


def slots(routing: Routing, config: CapacityConfig, factor: float, groups: int) -> int:
    tokens, top_k = routing.expert_TK.shape
    return expert_capacity(
        factor, tokens // groups, top_k, routing.score_TE.shape[1], config.min_capacity
    )


def limit_to(
    routing: Routing, config: CapacityConfig, factor: float | None, groups: int
) -> DispatchPlan:
    """Apply capacity with the slots that a layer would offer."""
    capacity = None if factor is None else slots(routing, config, factor, groups)
    return apply_capacity(routing, BatchShape(groups=groups, capacity=capacity), config, NoComm())
