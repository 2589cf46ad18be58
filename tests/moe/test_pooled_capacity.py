"""`capacity.pool`: consecutive experts share their slots."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmoe.config.errors import ConfigError
from dmoe.config.schema import CapacityConfig, ExpertsConfig, RouterConfig
from dmoe.moe.capacity import apply_capacity
from dmoe.moe.experts.grouped_mlp import feed_forward, feed_forward_in_steps
from dmoe.moe.padded_slots import pooled_rows
from dmoe.moe.placement import ExpertPlacement, to_physical_experts
from dmoe.moe.routing import BatchShape, DispatchPlan, Routing, TokenContext
from tests.moe.layers import close, gradients, make, tokens_of
from tests.moe.next_choice_cases import next_choice_routings
from tests.moe.strategies import drawn, limit_to, slots
from tests.moe.threaded_ranks import run_threads, split_over_ranks
from tests.references.capacity import apply_capacity_reference

factors = st.sampled_from([0.1, 0.5, 1.0, 1.25, 2.0])
configs = st.builds(
    CapacityConfig,
    priority=st.sampled_from(["position", "score"]),
    overflow=st.sampled_from(["drop", "next_choice"]),
    pool=st.sampled_from([2, 3, 4, 12]),
    pool_floor=st.sampled_from([0.0, 0.29, 0.5, 1.0]),
)
ranked = st.sampled_from([1, 2, 3]).flatmap(lambda ranks: next_choice_routings(ranks))


def check_rows(plan: DispatchPlan, ranks: int) -> None:
    """Places are 0, 1, ... per (group, expert), and every kept assignment has a row of its own."""
    assert plan.slots is not None
    assert plan.keep_TK is not None
    group_TK = torch.arange(len(plan.expert_TK)).unsqueeze(1) // max(
        1, len(plan.expert_TK) // plan.slots.groups
    )
    for group in range(plan.slots.groups):
        for expert in range(plan.num_experts):
            mine_TK = plan.keep_TK & (plan.expert_TK == expert) & (group_TK == group)
            places = sorted(plan.slots.position_TK[mine_TK].tolist())
            assert places == list(range(len(places)))
    # experts dealt out to the ranks in turn, one physical expert per rank unused
    owned = tuple(tuple(range(rank, plan.num_experts, ranks)) for rank in range(ranks))
    if not all(owned):
        return
    physical = to_physical_experts(plan, ExpertPlacement(owned))
    permutation, count_Pe = pooled_rows(physical, ranks, extra=1)
    assert permutation.filled_R is not None
    assert int(permutation.filled_R.sum()) == int(count_Pe.sum()) == int(plan.keep_TK.sum())
    block = physical.slots.rows_per_rank + 1  # type: ignore[union-attr]
    filled_Pb = permutation.filled_R.view(ranks, block)
    assert not filled_Pb[:, -1].any(), "the counts' row"
    assert torch.equal(filled_Pb.sum(1), count_Pe.sum(1))
    for t, k in plan.keep_TK.nonzero().tolist():
        row = int(permutation.row_TK[t, k])
        assert int(permutation.assignment_R[row]) == t * plan.expert_TK.shape[1] + k
        local = torch.searchsorted(count_Pe[row // block].cumsum(0), row % block, right=True)
        assert owned[row // block][int(local)] == int(plan.expert_TK[t, k])


@drawn
@given(drawn_routing=next_choice_routings(), config=configs, factor=factors, ep=st.integers(1, 3))
def test_pools_equal_the_walk(
    drawn_routing: tuple[Routing, int], config: CapacityConfig, factor: float, ep: int
) -> None:
    routing, groups = drawn_routing
    plan = limit_to(routing, config, factor, groups)
    capacity = slots(routing, config, factor, groups)
    keep_TK, expert_TK = apply_capacity_reference(routing, config, groups, capacity)
    assert plan.keep_TK is not None
    assert torch.equal(plan.keep_TK, keep_TK)
    assert torch.equal(plan.expert_TK, expert_TK)
    check_rows(plan, ep)
    if config.overflow == "drop" and config.pool_floor == 1.0:
        alone = limit_to(routing, replace(config, pool=1), factor, groups)
        assert not bool((alone.keep_TK & ~plan.keep_TK).any()), "a pool only adds slots"


@drawn
@given(world=ranked, config=configs, factor=factors)
def test_a_capacity_of_all_ranks_equals_the_walk(
    world: tuple[Routing, int], config: CapacityConfig, factor: float
) -> None:
    routing, ranks = world
    config, parts = replace(config, group="global"), split_over_ranks(routing, ranks)
    shape = BatchShape(capacity=slots(routing, config, factor, 1))
    plans = run_threads(ranks, lambda comm: apply_capacity(parts[comm.rank], shape, config, comm))
    assert shape.capacity is not None
    keep_TK, expert_TK = apply_capacity_reference(routing, config, 1, shape.capacity)
    assert torch.equal(torch.cat([plan.is_kept_TK for plan in plans]), keep_TK)
    assert torch.equal(torch.cat([plan.expert_TK for plan in plans]), expert_TK)
    for plan in plans:
        check_rows(plan, 2)


def test_the_example_of_the_docstring() -> None:
    """Six assignments of expert 0, two of expert 1, three slots each."""
    expert_TK = torch.tensor([0, 0, 0, 1, 0, 0, 1, 0]).unsqueeze(1)
    score_TE = torch.linspace(0.1, 0.9, 16).view(8, 2)
    routing = Routing(expert_TK, torch.ones(8, 1), score_TE, score_TE.log())
    kept = {}
    for pool, floor in ((1, 1.0), (2, 1.0), (2, 0.0)):
        config = CapacityConfig(pool=pool, pool_floor=floor)
        kept[pool, floor] = limit_to(routing, config, 0.75, 1).is_kept_TK[:, 0].tolist()
    assert kept[1, 1.0] == [True, True, True, True, False, False, True, False]
    assert kept[2, 1.0] == [True, True, True, True, True, False, True, False]
    # without a floor the pool is one queue: the late token of expert 1 finds no slot
    assert kept[2, 0.0] == [True, True, True, True, True, True, False, False]


CASES: dict[str, dict[str, Any]] = {
    "position": {"capacity": {}},
    "score, sequences": {"capacity": {"group": "sequence", "priority": "score", "pool_floor": 0.4}},
    "next choice": {"capacity": {"overflow": "next_choice"}, "virtual_ranks": 2},
    "zero-cost": {"capacity": {"pool_floor": 0.0}, "experts": ExpertsConfig(zero=1, copy=1)},
    "unequal": {"capacity": {}, "experts": ExpertsConfig(shapes=[[4], [], [7], [4], [3, 2], [4]])},
}


@pytest.mark.parametrize("name", CASES)
def test_packed_equals_padded(name: str) -> None:
    """With padding of the batch that holds NaN, and tokens that keep nothing."""
    options = dict(CASES[name])
    limits = CapacityConfig(factor=0.8, pool=3, **options.pop("capacity"))
    valid_T = torch.arange(4 * 7) % 6 != 2
    x = tokens_of(4, 7).detach()
    x.view(28, -1)[~valid_T] = torch.nan
    results = [
        gradients(
            make(num_experts=6, capacity=limits, exchange=exchange, **options),
            x.clone().requires_grad_(),
            TokenContext(valid_T=valid_T),
        )
        for exchange in ("packed", "padded")
    ]
    (one, gradient_one), (two, gradient_two) = results
    assert torch.equal(one.plan.is_kept_TK, two.plan.is_kept_TK)
    assert int(one.stats.kept_E.sum()) < int(one.stats.choice_E.sum())
    close(one.y, two.y, 1e-12)
    close(gradient_one, gradient_two, 1e-12)


@pytest.mark.parametrize("function", [feed_forward, feed_forward_in_steps])
@pytest.mark.parametrize("recomputed", [False, True])
def test_unused_rows_are_not_computed(function: Any, recomputed: bool) -> None:
    """Whatever they hold: the result and the gradient of these rows are zero."""
    torch.manual_seed(0)
    shapes = ((9, 6), (3, 6, 8), (3, 4, 5))
    drawn_in = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    drawn_in[0][7:] = torch.nan
    counts, found = torch.tensor([4, 0, 3]), []
    for rows, sizes in ((9, torch.cat([counts, torch.tensor([2])])), (7, counts)):
        x, up, down = (t.clone().requires_grad_() for t in (drawn_in[0][:rows], *drawn_in[1:]))
        out = function("swiglu", x, up, down, sizes, recomputed)
        out[:7].sin().sum().backward()
        found.append([out[:7], x.grad[:7], up.grad, down.grad])
        assert not out[7:].any()
        assert not x.grad[7:].any()
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("capacity", "options", "message"),
    [
        ({"pool": 4}, {}, r"capacity\.pool=4: must divide num_experts=6"),
        ({"pool": 3, "factor": None}, {}, r"capacity\.pool=3: shares slots, and there are none"),
        ({"pool_floor": 0.5}, {}, r"capacity\.pool_floor=0\.5: is a share of the slots"),
        ({"pool": 3, "pool_floor": 1.5}, {}, r"capacity\.pool_floor=1\.5: must be between 0 and 1"),
        ({"pool": 3}, {"router": RouterConfig(kind="soft")}, "no expert overflows"),
    ],
)
def test_refusals(capacity: dict[str, Any], options: dict[str, Any], message: str) -> None:
    limits = CapacityConfig(**({"factor": 1.25} | capacity))
    with pytest.raises(ConfigError, match=message):
        make(num_experts=6, experts_per_token=6 if options else 2, capacity=limits, **options)
