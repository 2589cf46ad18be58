"""The bias update against its loop: exact ties, no drift, equal bits on every rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmoe.moe.load_balancing import updated_bias
from tests.moe.strategies import drawn, random_routing
from tests.moe.threaded_ranks import run_threads, split_over_ranks
from tests.references.load_balancing import bias_reference


@drawn
@given(
    pairs=st.lists(
        st.tuples(st.floats(-1, 1), st.integers(0, 5) | st.integers(0, 2**40)),
        min_size=1,
        max_size=13,
    ),
    rate=st.sampled_from([0.0, 0.001, 0.5]),
    recenter=st.booleans(),
)
def test_update_equals_the_loop(
    pairs: list[tuple[float, int]], rate: float, recenter: bool
) -> None:
    bias, counts = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    got = updated_bias(
        torch.tensor(bias, dtype=torch.float64), torch.tensor(counts), rate, recenter
    )
    assert got.tolist() == pytest.approx(
        bias_reference(bias, counts, rate, recenter), rel=1e-12, abs=1e-12
    )


def test_direction() -> None:
    """Whoever has too few rises, who has too many falls, who has just the mean stays."""
    got = updated_bias(torch.zeros(4), torch.tensor([1, 5, 3, 3]), 0.5, recenter=False)
    assert got.tolist() == [0.5, -0.5, 0.0, 0.0]


@pytest.mark.parametrize("large", [2**24, 2**53])
def test_counts_that_float_cannot_tell_apart(large: int) -> None:
    """Counts are compared as integers: exact at 16 million (float32) and at 9e15 (float64)."""
    assert updated_bias(
        torch.zeros(2), torch.tensor([large, large + 1]), 0.5, recenter=False
    ).tolist() == [0.5, -0.5]


def test_no_choices_move_nothing() -> None:
    assert (
        updated_bias(torch.zeros(5), torch.zeros(5, dtype=torch.int64), 0.5, recenter=True).tolist()
        == [0.0] * 5
    )


def test_recentred_bias_does_not_drift() -> None:
    count_E = torch.tensor([40, 1, 1, 1, 1])  # four rise for one that falls
    free_E, held_E = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for _ in range(50):
        free_E, held_E = (
            updated_bias(free_E, count_E, 0.1, recenter=False),
            updated_bias(held_E, count_E, 0.1, recenter=True),
        )
    assert float(free_E.mean()) == pytest.approx(3.0)
    assert abs(float(held_E.mean())) < 1e-12
    assert torch.allclose(held_E - held_E[0], free_E - free_E[0])  # no choice depends on it


def test_layers_at_once_are_layers_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    bias_LE, count_LE = (
        torch.randn(3, 7, generator=generator),
        torch.randint(0, 9, (3, 7), generator=generator),
    )
    one_by_one = [
        updated_bias(bias_E, count_E, 0.01, recenter=True)
        for bias_E, count_E in zip(bias_LE, count_LE, strict=True)
    ]
    assert torch.equal(
        updated_bias(bias_LE, count_LE, 0.01, recenter=True), torch.stack(one_by_one)
    )


def test_every_rank_has_the_same_bits_for_any_number_of_ranks() -> None:
    routing = random_routing(24, 5, 2, hot=1)
    bias_E = torch.linspace(-1, 1, 5)
    alone = updated_bias(bias_E, routing.choice_count()[0], 0.01, recenter=True)
    for ranks in (2, 3, 4):
        parts = split_over_ranks(routing, ranks)
        counts = run_threads(
            ranks, lambda comm, parts=parts: comm.sum(parts[comm.rank].choice_count()[0])
        )  # type: ignore[misc]
        assert all(
            torch.equal(updated_bias(bias_E, count_E, 0.01, recenter=True), alone)
            for count_E in counts
        )
