"""Which task a sample comes from: the formula, its limits, and that ranks and resumes draw the same."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoe.config.errors import ConfigError
from dmoe.modular.tasks import task_of, task_weights, tasks_of_step

SIZES = st.lists(st.floats(1.0, 1e9), min_size=1, max_size=6)


@given(SIZES, st.floats(0.5, 100.0))
def test_weights_are_the_formula(sizes: list[float], temperature: float) -> None:
    weights = task_weights(sizes, temperature)
    assert math.isclose(sum(weights), 1.0)
    for one, other, size, another in zip(weights, weights[1:], sizes, sizes[1:], strict=False):
        assert math.isclose(math.log(one / other), math.log(size / another) / temperature, rel_tol=1e-6, abs_tol=1e-9)


@given(SIZES)
def test_proportional_and_equal_are_the_two_ends(sizes: list[float]) -> None:
    assert task_weights(sizes) == pytest.approx([size / sum(sizes) for size in sizes])
    assert task_weights(sizes, math.inf) == pytest.approx([1 / len(sizes)] * len(sizes))


@given(st.integers(0, 50), st.integers(1, 12), st.integers(0, 5), st.randoms(use_true_random=False))
def test_any_split_of_a_batch_draws_the_same_tasks(step: int, batch: int, seed: int, random: object) -> None:
    cut = random.randint(0, batch)  # type: ignore[attr-defined]
    weights = [0.5, 0.2, 0.3]
    whole = tasks_of_step(step, 0, batch, batch, weights, seed)
    assert whole == tasks_of_step(step, 0, cut, batch, weights, seed) + tasks_of_step(
        step, cut, batch - cut, batch, weights, seed
    )
    assert whole == [task_of(step * batch + i, weights, seed) for i in range(batch)]


def test_tasks_are_drawn_as_often_as_their_weights_say() -> None:
    """4000 draws: five standard deviations of a count are less than 0.04 of them."""
    weights = task_weights([100, 10, 1], 2.0)
    drawn = tasks_of_step(0, 0, 4000, 4000, weights, seed=1)
    for task, weight in enumerate(weights):
        assert abs(drawn.count(task) / 4000 - weight) < 0.04
    assert drawn != tasks_of_step(0, 0, 4000, 4000, weights, seed=2)


@pytest.mark.parametrize(("sizes", "temperature"), [([], 1.0), ([1, 0], 1.0), ([1, -1], 1.0), ([1, math.inf], 1.0), ([1], 0.0)])
def test_what_means_nothing_is_refused(sizes: list[float], temperature: float) -> None:
    with pytest.raises(ConfigError, match="must be"):
        task_weights(sizes, temperature)
