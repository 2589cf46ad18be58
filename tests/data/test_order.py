from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.data.order import permute, sequence_indices

FIXED_10 = [0, 7, 6, 1, 9, 2, 3, 4, 8, 5]
FIXED_MILLION = [696282, 835792, 449859, 965630]
SEEDS = st.integers(min_value=-(2**63), max_value=2**64)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 2**40))
def test_it_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    image_N = permute(np.arange(size), size, seed, epoch)
    assert np.array_equal(np.sort(image_N), np.arange(size))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 2**61), seed=SEEDS, data=st.data())
def test_huge_sizes_stay_in_range_and_distinct(size: int, seed: int, data: st.DataObject) -> None:
    index_N = np.array(
        data.draw(st.lists(st.integers(0, size - 1), unique=True, max_size=20)), dtype=np.int64
    )
    image_N = permute(index_N, size, seed, 3)
    assert ((image_N >= 0) & (image_N < size)).all()
    assert len(set(image_N.tolist())) == len(index_N)


def test_the_numbers_are_fixed() -> None:
    """A change of the order breaks every resume: change the checkpoint format with it."""
    assert permute(np.arange(10), 10, seed=0, epoch_N=0).tolist() == FIXED_10
    assert sequence_indices(7, 2, 4, 8, num_sequences=10**6, seed=1).tolist() == FIXED_MILLION


def test_epochs_and_seeds_differ() -> None:
    orders = {
        tuple(permute(np.arange(50), 50, seed, epoch)) for seed in range(10) for epoch in range(10)
    }
    assert len(orders) == 100


def test_one_epoch_for_each_index_equals_one_epoch_for_all() -> None:
    index_N = np.arange(30)
    mixed_N = permute(index_N, 30, 5, np.where(index_N < 12, 4, 9))
    expected_N = np.where(index_N < 12, permute(index_N, 30, 5, 4), permute(index_N, 30, 5, 9))
    assert np.array_equal(mixed_N, expected_N)


def test_positions_are_uniform_over_epochs() -> None:
    """Chi-square of the positions of 12 items over 6000 epochs: 121 degrees of freedom.

    Mean 121, standard deviation 15.6.
    """
    size, epochs = 12, 6000
    place = permute(
        np.tile(np.arange(size), epochs), size, 0, np.repeat(np.arange(epochs), size)
    ).reshape(epochs, size)
    count = np.array([np.bincount(place[:, item], minlength=size) for item in range(size)])
    expected = epochs / size
    assert ((count - expected) ** 2 / expected).sum() < 121 + 5 * 15.6


def test_neighbours_are_torn_apart() -> None:
    place_N = permute(np.arange(10_000), 10_000, 0, 0)
    assert (np.abs(np.diff(place_N)) == 1).mean() < 0.002
    assert abs(np.corrcoef(place_N, np.arange(10_000))[0, 1]) < 0.05


@settings(max_examples=50, deadline=None)
@given(sequences=st.integers(1, 40), batch=st.integers(1, 90), seed=SEEDS)
def test_every_epoch_reads_every_sequence_once(sequences: int, batch: int, seed: int) -> None:
    steps = -(-3 * sequences // batch)
    read = np.concatenate(
        [sequence_indices(step, 0, batch, batch, sequences, seed) for step in range(steps)]
    )
    for epoch in range(3):
        assert np.array_equal(
            np.sort(read[epoch * sequences : (epoch + 1) * sequences]), np.arange(sequences)
        )


def test_each_epoch_has_its_own_order() -> None:
    first_N, second_N = (sequence_indices(step, 0, 40, 40, 40, seed=0) for step in (0, 1))
    assert not np.array_equal(first_N, second_N)


def test_a_sample_depends_on_step_and_place_alone() -> None:
    whole = sequence_indices(11, 0, 24, 24, 37, seed=3)
    for ranks in (1, 2, 3, 4, 8, 24):
        share = 24 // ranks
        assert np.array_equal(
            np.concatenate(
                [sequence_indices(11, r * share, share, 24, 37, 3) for r in range(ranks)]
            ),
            whole,
        )
