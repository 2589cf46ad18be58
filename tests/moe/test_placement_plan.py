"""The planner of moves: even, few, inside a host where that does, and none that does not pay."""

from __future__ import annotations

from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from dmoe.moe.placement import ExpertPlacement, contiguous_placement
from dmoe.moe.placement_plan import MIN_GAIN, SLACK, keep_places, max_over_mean, plan_placement
from tests.moe.strategies import drawn


def largest(rows_E: list[int], placement: ExpertPlacement) -> int:
    return max(sum(rows_E[e] for e in own) for own in placement.experts)


def least_by_trying_all(rows_E: list[int], ranks: int) -> int:
    """Return the smallest largest load of any placement with equal numbers."""
    share = len(rows_E) // ranks
    return min(
        max(sum(order[i : i + share]) for i in range(0, len(order), share))
        for order in permutations(rows_E)
    )


def test_by_hand() -> None:
    """Rank 0 has 6 + 5 of 14 rows: expert 0 and 3 together are even, and one swap gives them."""
    start = contiguous_placement(4, 2)
    assert plan_placement([6, 5, 2, 1], start) == ExpertPlacement(((0, 3), (2, 1)))
    assert plan_placement([5, 5, 5, 5], start) is start, "even already"
    assert plan_placement([0, 0, 0, 0], start) is start, "no rows"
    assert plan_placement([100, 98, 97, 98], start) is start, "gains less than MIN_GAIN"
    assert keep_places(start, [[3, 1], [0, 2]]).experts == ((3, 1), (2, 0)), "stay in place"
    assert max_over_mean([3, 1, 1, 1], start) == 4 / 3
    assert max_over_mean([0] * 4, start) == 1


@drawn
@given(rows_E=st.lists(st.integers(0, 30), min_size=6, max_size=6), ranks=st.sampled_from([2, 3]))
def test_near_the_best_of_all_placements(rows_E: list[int], ranks: int) -> None:
    """Longest processing time alone is within 4/3 of the best without equal numbers."""
    start, mean = contiguous_placement(6, ranks), sum(rows_E) / ranks
    best, found = least_by_trying_all(rows_E, ranks), plan_placement(rows_E, start)
    assert largest(rows_E, found) <= max(4 / 3 * best, best + (MIN_GAIN + SLACK) * mean)


@drawn
@given(
    weights=st.lists(st.integers(0, 1000), min_size=24, max_size=24),
    ranks=st.sampled_from([2, 3, 4, 6, 8, 12]),
    hosts=st.sampled_from([1, 2]),
    order=st.permutations(range(24)),
)
def test_every_plan_is_whole_and_pays(
    weights: list[int], ranks: int, hosts: int, order: list[int]
) -> None:
    share = 24 // ranks
    start = keep_places(
        contiguous_placement(24, ranks), [order[r * share : (r + 1) * share] for r in range(ranks)]
    )
    found = plan_placement(weights, start, [rank * hosts // ranks for rank in range(ranks)])
    assert sorted(e for own in found.experts for e in own) == list(range(24))
    assert {len(own) for own in found.experts} == {share}
    for before, after in zip(start.experts, found.experts, strict=True):
        assert all(a == b for a, b in zip(before, after, strict=True) if a in after)
    gain = largest(weights, start) - largest(weights, found)
    assert found is start or gain >= MIN_GAIN * sum(weights) / ranks > 0


def test_moves_inside_a_host_come_first() -> None:
    """Two hosts of two ranks; both can even out alone, and a swap between them would do as well."""
    start, hosts = contiguous_placement(8, 4), [0, 0, 1, 1]
    rows_E = [4, 4, 1, 1, 4, 4, 1, 1]
    found = plan_placement(rows_E, start, hosts)
    assert max_over_mean(rows_E, found) == 1
    moved = [e for e in range(8) if found.rank_of[e] != start.rank_of[e]]
    assert moved
    assert all(hosts[found.rank_of[e]] == hosts[start.rank_of[e]] for e in moved)
    # One host has all the load: then experts do change hosts.
    rows_E = [4, 4, 4, 4, 0, 0, 0, 0]
    found = plan_placement(rows_E, start, hosts)
    assert max_over_mean(rows_E, found) == 1
    assert {hosts[found.rank_of[e]] for e in range(4)} == {0, 1}
