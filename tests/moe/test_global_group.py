"""`capacity.group: global`: one queue per expert for the tokens of all ranks."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmoe.config.schema import CapacityConfig
from dmoe.moe.capacity import apply_capacity
from dmoe.moe.interfaces import DataParallelComm
from dmoe.moe.padded_slots import padded_permutation
from dmoe.moe.routing import BatchShape, DispatchPlan, Routing
from tests.moe.layers import close, make, tokens_of
from tests.moe.next_choice_cases import crowded_routing, next_choice_routings, with_next_experts
from tests.moe.strategies import drawn, random_routing, slots
from tests.moe.threaded_ranks import ThreadComm, run_threads, split_over_ranks
from tests.references.capacity import apply_capacity_reference

factors = st.sampled_from([0.1, 0.5, 1.0, 1.25, 2.0, 100.0])
configs = st.builds(
    CapacityConfig,
    min_capacity=st.integers(0, 2),
    priority=st.sampled_from(["position", "score"]),
    group=st.just("global"),
    overflow=st.sampled_from(["drop", "next_choice"]),
    renormalize=st.booleans(),
)
worlds = st.sampled_from([1, 2, 3, 4]).flatmap(lambda ranks: next_choice_routings(ranks))


def limit_on_ranks(
    routing: Routing, config: CapacityConfig, factor: float, ranks: int
) -> list[DispatchPlan]:
    parts, capacity = split_over_ranks(routing, ranks), slots(routing, config, factor, 1)
    return run_threads(
        ranks,
        lambda comm: apply_capacity(parts[comm.rank], BatchShape(capacity=capacity), config, comm),
    )


@drawn
@given(world=worlds, config=configs, factor=factors)
def test_ranks_equal_one_walk_over_all_tokens(
    world: tuple[Routing, int], config: CapacityConfig, factor: float
) -> None:
    routing, ranks = world
    plan = limit_on_ranks(routing, config, factor, ranks)
    keep_TK, expert_TK = apply_capacity_reference(
        routing, config, 1, slots(routing, config, factor, 1)
    )
    assert torch.equal(
        torch.cat([part.keep_TK for part in plan if part.keep_TK is not None]), keep_TK
    )
    assert torch.equal(torch.cat([part.expert_TK for part in plan]), expert_TK)
    [alone] = limit_on_ranks(routing, config, factor, 1)
    assert torch.equal(torch.cat([part.weight_TK for part in plan]), alone.weight_TK)


@drawn
@given(world=worlds, config=configs, factor=factors)
def test_slots_on_each_rank_have_no_gap(
    world: tuple[Routing, int], config: CapacityConfig, factor: float
) -> None:
    """min(C, T) slots for each rank's share of the queue suffice in the padded exchange."""
    routing, ranks = world
    capacity, num_experts = slots(routing, config, factor, 1), routing.score_TE.shape[1]
    plan = limit_on_ranks(routing, config, factor, ranks)
    for part in plan:
        assert part.keep_TK is not None
        assert part.slots is not None
        assert part.slots.groups == 1
        assert part.slots.capacity == min(capacity, len(routing.expert_TK) // ranks)
        for expert in range(num_experts):
            taken = sorted(
                part.slots.position_TK[part.keep_TK & (part.expert_TK == expert)].tolist()
            )
            assert taken == list(range(len(taken)))
            assert len(taken) <= part.slots.capacity
        filled_R = padded_permutation(part).filled_R
        assert filled_R is not None
        assert int(filled_R.sum()) == int(part.keep_TK.sum())
    assert sum(part.slots.offered for part in plan if part.slots is not None) == pytest.approx(
        capacity * num_experts
    )
    kept_E = sum(
        torch.bincount(part.expert_TK[part.keep_TK], minlength=num_experts) for part in plan
    )
    assert isinstance(kept_E, torch.Tensor)
    assert int(kept_E.max()) <= capacity


@pytest.mark.parametrize("priority", ["position", "score"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_crowded_ranks_equal_the_walk(ranks: int, priority: str) -> None:
    """Rerouting to experts that are partly full on other ranks and on this one."""
    config = CapacityConfig(group="global", priority=priority, overflow="next_choice")  # type: ignore[arg-type]
    for seed in range(6):
        routing = crowded_routing(seed)
        plan = limit_on_ranks(routing, config, 1.0, ranks)
        keep_TK, expert_TK = apply_capacity_reference(
            routing, config, 1, slots(routing, config, 1.0, 1)
        )
        assert torch.equal(
            torch.cat([part.keep_TK for part in plan if part.keep_TK is not None]), keep_TK
        )
        assert torch.equal(torch.cat([part.expert_TK for part in plan]), expert_TK)
        for part, expert in product(plan, range(6)):
            assert part.slots is not None
            assert part.keep_TK is not None
            taken = sorted(
                part.slots.position_TK[part.keep_TK & (part.expert_TK == expert)].tolist()
            )
            assert taken == list(range(len(taken)))


@pytest.mark.parametrize("priority", ["position", "score"])
@pytest.mark.parametrize("hot", [None, 3])
def test_a_rank_of_padding_takes_nothing_and_hangs_nobody(priority: str, hot: int | None) -> None:
    routing = random_routing(24, 5, 2, seed=5, hot=hot)
    routing = replace(routing, selected_TK=(torch.arange(24) >= 8).unsqueeze(1).expand(24, 2))
    config = CapacityConfig(group="global", priority=priority)  # type: ignore[arg-type]
    plan = limit_on_ranks(routing, config, 0.5, 3)
    keep_TK, _ = apply_capacity_reference(routing, config, 1, slots(routing, config, 0.5, 1))
    assert torch.equal(
        torch.cat([part.keep_TK for part in plan if part.keep_TK is not None]), keep_TK
    )
    assert plan[0].keep_TK is not None
    assert not plan[0].keep_TK.any()
    assert keep_TK.any()


def test_first_choices_of_the_last_rank_come_before_second_choices_of_the_first() -> None:
    routing = replace(
        random_routing(4, 2, 2), expert_TK=torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1]])
    )
    config = CapacityConfig(group="global")
    plan = run_threads(
        2,
        lambda comm: apply_capacity(
            split_over_ranks(routing, 2)[comm.rank], BatchShape(capacity=3), config, comm
        ),
    )
    assert [part.keep_TK.tolist() for part in plan if part.keep_TK is not None] == [
        [[True, True], [True, False]],
        [[True, True], [True, False]],
    ]


@pytest.mark.parametrize("priority", ["position", "score"])
@pytest.mark.parametrize(("overflow", "collectives"), [("drop", 1), ("next_choice", 2)])
def test_collectives(priority: str, overflow: str, collectives: int) -> None:
    routing = with_next_experts(random_routing(8, 5, 2), 2)
    config = CapacityConfig(group="global", priority=priority, overflow=overflow)  # type: ignore[arg-type]

    def counted(comm: DataParallelComm) -> int:
        apply_capacity(
            split_over_ranks(routing, 2)[comm.rank], BatchShape(capacity=2), config, comm
        )
        assert isinstance(comm, ThreadComm)
        return comm.collectives

    assert run_threads(2, counted) == [collectives] * 2


@pytest.mark.parametrize("exchange", ["packed", "padded"])
@pytest.mark.parametrize("priority", ["position", "score"])
def test_layer_on_ranks_equals_the_layer_alone(priority: str, exchange: str) -> None:
    limits = CapacityConfig(factor=0.8, group="global", priority=priority)  # type: ignore[arg-type]
    x = tokens_of(4, 6).detach()
    alone = make(capacity=limits, exchange=exchange, virtual_ranks=4)(x)

    def run(comm: DataParallelComm) -> tuple[torch.Tensor, torch.Tensor]:
        layer = make(capacity=limits, exchange=exchange, virtual_ranks=2)
        layer.comm = comm
        output = layer(x[2 * comm.rank : 2 * comm.rank + 2])
        return output.y.detach(), output.stats.as_vector()

    parts = run_threads(2, run)
    assert int(alone.stats.kept_E.sum()) < int(alone.stats.choice_E.sum())
    close(torch.cat([y for y, _ in parts]), alone.y.detach(), 1e-12)
    close(parts[0][1] + parts[1][1], alone.stats.as_vector(), 1e-12)
