"""Thinned curves keep extreme values and ends."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dmoe.report.charts import keep_extremes, most_imbalanced_steps

VALUES = st.lists(st.none() | st.floats(-1e6, 1e6), min_size=1, max_size=400)


@given(VALUES, st.integers(4, 50))
def test_extremes_and_ends_are_kept_unchanged(values: list[float | None], limit: int) -> None:
    steps = [3 * index + 1 for index in range(len(values))]
    kept_steps, kept = keep_extremes(steps, values, limit)
    truth = dict(zip(steps, values, strict=True))
    assert len(kept_steps) <= max(limit, 4)
    assert kept_steps == sorted(set(kept_steps))
    assert all(truth[step] == value for step, value in zip(kept_steps, kept, strict=True))
    assert (kept_steps[0], kept_steps[-1]) == (steps[0], steps[-1])
    there, drawn = [v for v in values if v is not None], [v for v in kept if v is not None]
    if there:
        assert (min(drawn), max(drawn)) == (min(there), max(there))


def test_one_spike_in_100_000_steps_stays() -> None:
    values: list[float | None] = [1.0] * 100_000
    values[54_321] = 99.0
    steps, kept = keep_extremes(range(100_000), values, 1000)
    assert kept[steps.index(54_321)] == 99.0
    assert len(steps) <= 1000


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.integers(2, 40))
def test_the_worst_step_and_the_last_one_are_kept(imbalance: list[float], limit: int) -> None:
    kept = most_imbalanced_steps(imbalance, limit)
    assert len(kept) <= limit
    assert kept == sorted(set(kept))
    assert kept[-1] == len(imbalance) - 1
    assert max(imbalance[index] for index in kept) == max(imbalance)
