"""Expert placement, and the map from logical to physical ids."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmoe.moe.capacity import dropless_plan
from dmoe.moe.dispatch import packed_permutation
from dmoe.moe.padded_slots import padded_permutation
from dmoe.moe.placement import (
    ExpertPlacement,
    balanced_placement,
    contiguous_placement,
    to_physical_experts,
)
from dmoe.moe.routing import DispatchPlan, ExpertSlots
from tests.moe.strategies import drawn, random_routing


def test_longest_first_by_hand() -> None:
    """The example of placement.py; ties go to less work, fewer experts, the lower rank."""
    assert balanced_placement([6, 5, 4, 3, 2], range(5), 2) == ExpertPlacement(((0, 3, 4), (1, 2)))
    assert balanced_placement([6, 5, 4, 3, 2], range(5), 2).physical_ids.values == (0, 3, 4, 1, 2)
    assert balanced_placement([9, 1, 1, 1], range(4), 2) == ExpertPlacement(((0,), (1, 2, 3))), (
        "work counts, not numbers"
    )
    assert balanced_placement([1, 1, 1], [0, 0, 0], 2) == ExpertPlacement(((0, 2), (1,)))
    assert balanced_placement([3, 1, 3, 1], [9, 8, 9, 8], 1) == ExpertPlacement(((0, 2, 1, 3),)), (
        "equal shapes side by side"
    )


@drawn
@given(costs=st.lists(st.integers(1, 20), min_size=1, max_size=14), data=st.data())
def test_longest_first_is_whole_and_near_the_best(costs: list[int], data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, len(costs)))
    shapes = data.draw(st.lists(st.integers(0, 3), min_size=len(costs), max_size=len(costs)))
    owned = balanced_placement(costs, shapes, ranks)
    assert sorted(e for mine in owned.experts for e in mine) == list(range(len(costs)))
    assert all(owned.experts), "every rank has an expert"
    work = [sum(costs[e] for e in mine) for mine in owned.experts]
    best = max(max(costs), -(-sum(costs) // ranks))  # no schedule can be shorter
    assert max(work) <= sum(costs) / ranks + (1 - 1 / ranks) * max(costs) + 1e-9
    assert max(work) <= 2 * best
    for mine in owned.experts:
        kinds = [shapes[e] for e in mine]
        assert sum(a != b for a, b in pairwise(kinds)) == len(set(kinds)) - 1, "one block a shape"
    places = [owned.physical_ids.values[e] for mine in owned.experts for e in mine]
    assert places == [
        rank * owned.experts_per_rank + slot
        for rank, mine in enumerate(owned.experts)
        for slot in range(len(mine))
    ]


def test_uniform_experts_are_where_their_ids_say_and_cost_nothing() -> None:
    plan = dropless_plan(random_routing(9, 6, 2))
    assert contiguous_placement(6, 3).experts == ((0, 1), (2, 3), (4, 5))
    assert to_physical_experts(plan, contiguous_placement(6, 3)) is plan


@pytest.mark.parametrize("masked", [None, 0.4])
def test_every_choice_stands_in_the_queue_of_its_place(masked: float | None) -> None:
    plan, owned = (
        dropless_plan(random_routing(40, 5, 3, masked=masked)),
        balanced_placement([6, 5, 4, 3, 2], range(5), 2),
    )
    _, count = packed_permutation(to_physical_experts(plan, owned))
    _, count_E = packed_permutation(plan)
    assert count.tolist() == [count_E[0], count_E[3], count_E[4], count_E[1], count_E[2], 0]
    assert owned.sum_per_rank(count_E).tolist() == [count_E[[0, 3, 4]].sum(), count_E[[1, 2]].sum()]


def test_what_costs_nothing_stays_at_home() -> None:
    """Assignments of the two zero-cost experts have no rows, in either exchange."""
    expert_TK = torch.tensor([[0, 2], [3, 1], [2, 3]])
    slots = ExpertSlots(torch.zeros_like(expert_TK), capacity=2, groups=1, offered=4.0)
    plan = DispatchPlan(expert_TK, torch.ones(3, 2), None, 4, num_zero_cost=2, slots=slots)
    plan = to_physical_experts(plan, contiguous_placement(2, 1))
    assert plan.num_experts == 2
    assert plan.keep_TK is not None
    assert plan.keep_TK.tolist() == [[True, False], [False, True], [False, False]]
    assert packed_permutation(plan)[1].tolist() == [1, 1]
    assert padded_permutation(plan).filled_R.tolist() == [True, False, True, False]  # type: ignore[union-attr]
