"""Domain of each sample: the formula, its limits, and equal draws after a resume or re-sharding."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data import open_data, prepare_shards
from dmoe.data.mixture import (
    BLOCK_SIZE,
    MixtureDataset,
    block_quotas,
    draw_domains,
    mix_domains,
    sequences_of_domains,
    task_weights,
    tasks_of_step,
)
from dmoe.data.packing import PackedDataset

SIZES = st.lists(st.floats(1.0, 1e9), min_size=1, max_size=6)
WEIGHTS = st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=8)
FIXED = [2, 0, 0, 2, 0, 0, 2, 2, 0, 2, 1, 0, 2, 0, 0, 2]


@given(SIZES, st.floats(0.5, 100.0))
def test_weights_are_the_formula(sizes: list[float], temperature: float) -> None:
    weights = task_weights(sizes, temperature)
    assert math.isclose(sum(weights), 1.0)
    for one, other, size, another in zip(weights, weights[1:], sizes, sizes[1:], strict=False):
        assert math.isclose(
            math.log(one / other),
            math.log(size / another) / temperature,
            rel_tol=1e-6,
            abs_tol=1e-9,
        )


@given(SIZES)
def test_proportional_and_equal_are_the_two_ends(sizes: list[float]) -> None:
    assert task_weights(sizes) == pytest.approx([size / sum(sizes) for size in sizes])
    assert task_weights(sizes, math.inf) == pytest.approx([1 / len(sizes)] * len(sizes))


@pytest.mark.parametrize(
    ("sizes", "temperature"),
    [([], 1.0), ([1, 0], 1.0), ([1, -1], 1.0), ([1, math.inf], 1.0), ([1], 0.0)],
)
def test_what_means_nothing_is_refused(sizes: list[float], temperature: float) -> None:
    with pytest.raises(ConfigError, match="must be"):
        task_weights(sizes, temperature)


@given(WEIGHTS)
def test_a_block_holds_each_task_as_often_as_its_weight_says(weights: list[float]) -> None:
    count_D = block_quotas(weights)
    exact_D = np.array(weights) / sum(weights) * BLOCK_SIZE
    assert count_D.sum() == BLOCK_SIZE
    assert count_D.min() >= 1
    # Whole numbers nearest to the weights. Rare tasks are raised to 1, and each of them costs the
    # others at most one.
    assert np.abs(count_D - exact_D).max() < 1 + (exact_D < 1).sum()


def test_as_many_tasks_as_a_block_has_places_come_once_each() -> None:
    assert block_quotas([1.0, *([1e-9] * (BLOCK_SIZE - 1))]).tolist() == [1] * BLOCK_SIZE


@settings(max_examples=25, deadline=None)
@given(WEIGHTS, st.integers(0, 2**63), st.integers(0, 3 * BLOCK_SIZE))
def test_each_draw_of_a_task_comes_once_and_in_order(
    weights: list[float], seed: int, begin: int
) -> None:
    """Counting draws from the start of the run gives "the next sample of its domain"."""
    number_N = np.arange(begin, begin + 2 * BLOCK_SIZE)
    task_N, draw_N = draw_domains(number_N, block_quotas(weights), seed)
    before_D = np.zeros(len(weights), dtype=np.int64)
    if begin:
        before_D += np.bincount(
            draw_domains(np.arange(begin), block_quotas(weights), seed)[0], minlength=len(weights)
        )
    for task in range(len(weights)):
        mine_N = draw_N[task_N == task]
        assert mine_N.tolist() == list(range(before_D[task], before_D[task] + len(mine_N)))


def test_fractions_converge_and_batches_vary() -> None:
    weights = task_weights([1000, 100, 10], 2.0)
    found = np.array(tasks_of_step(0, 0, 40_000, 40_000, weights, seed=1))
    for task, weight in enumerate(weights):
        assert abs((found == task).mean() - weight) < 1 / 1000
        assert abs((found[:1000] == task).mean() - weight) < 0.06
    assert (
        len({tuple(np.bincount(found[i : i + 24], minlength=3)) for i in range(0, 2400, 24)}) > 20
    )
    assert tasks_of_step(0, 0, 500, 500, weights, 1) != tasks_of_step(0, 0, 500, 500, weights, 2)
    assert found[:BLOCK_SIZE].tolist() != found[BLOCK_SIZE : 2 * BLOCK_SIZE].tolist(), (
        "each block is shuffled anew"
    )


def test_the_draws_are_fixed() -> None:
    """A change of them breaks every resume of a run begun before it."""
    assert tasks_of_step(300, 0, 16, 16, [0.5, 0.2, 0.3], seed=0) == FIXED


@settings(max_examples=40, deadline=None)
@given(
    step=st.integers(0, 10**6), batch=st.integers(1, 60), seed=st.integers(0, 2**63), data=st.data()
)
def test_any_split_of_a_batch_draws_the_same(
    step: int, batch: int, seed: int, data: st.DataObject
) -> None:
    cut, weights = data.draw(st.integers(0, batch)), [0.5, 0.2, 0.3]
    whole = tasks_of_step(step, 0, batch, batch, weights, seed)
    rest = tasks_of_step(step, cut, batch - cut, batch, weights, seed)
    assert whole == tasks_of_step(step, 0, cut, batch, weights, seed) + rest


RUNS = ((0, 1), (350, 0), (390, 2), (391, 1), (777, 3))


def text(seed: int = 5) -> PackedDataset:
    """Token j of the stream is j, so the first token of a sequence is its position.

    Domain 2 is one token, in which no sequence starts.
    """
    return PackedDataset(
        [np.arange(600, dtype="<u4"), np.arange(600, 1000, dtype="<u4")],
        7,
        seed,
        1000,
        "train",
        RUNS,
    )


def test_the_sequences_of_a_domain_are_those_that_start_in_it() -> None:
    stream = text()
    label_N = stream.sample_labels(0, stream.num_sequences)
    found = sequences_of_domains(RUNS, stream.num_sequences, stream.seq_len)
    assert [domain.label for domain in found] == [0, 1, 3]
    for domain in found:
        assert (
            domain.sequence_index(np.arange(domain.size)).tolist()
            == np.flatnonzero(label_N == domain.label).tolist()
        )


def test_a_domain_is_read_whole_before_any_of_it_comes_again() -> None:
    stream, batch = mix_domains(text(), 3.0), 160
    steps = range(30)
    begin_N = np.concatenate([stream.batch(step, 0, batch, batch)[:, 0] for step in steps])
    label_N = np.concatenate([stream.labels(step, 0, batch, batch) for step in steps])
    sizes = {domain.label: domain.size for domain in stream.domains}
    orders = {}
    for label, size in sizes.items():
        mine_N = begin_N[label_N == label]
        epochs = len(mine_N) // size
        assert epochs > 5
        orders[label] = [mine_N[epoch * size : (epoch + 1) * size] for epoch in range(epochs)]
        assert all(len(set(order.tolist())) == size for order in orders[label])
        assert orders[label][0].tolist() != orders[label][1].tolist(), (
            "each epoch has its own order"
        )
        assert set(orders[label][0].tolist()) == set(orders[label][1].tolist())
    weights = task_weights(list(sizes.values()), 3.0)
    for label, weight in zip(sizes, weights, strict=True):
        assert abs((label_N == label).mean() - weight) < 0.02
        assert abs(stream.shares[label] - weight) < 1 / BLOCK_SIZE


def test_translations_are_not_shuffled_alike() -> None:
    """Domains of equal size would otherwise read page after page in step."""
    stream = mix_domains(
        PackedDataset([np.arange(701)], 7, 5, 701, "train", ((0, 0), (350, 1))), 1.0
    )
    assert [domain.size for domain in stream.domains] == [50, 50]
    begin_N, label_N = stream.batch(0, 0, 60, 60)[:, 0], stream.labels(0, 0, 60, 60)
    shorter = min((label_N == 0).sum(), (label_N == 1).sum())
    assert shorter > 10
    assert (begin_N[label_N == 0][:shorter] + 350).tolist() != begin_N[label_N == 1][
        :shorter
    ].tolist()


def test_a_sample_depends_on_seed_and_number_alone() -> None:
    stream, whole = mix_domains(text(), 2.0), mix_domains(text(), 2.0).batch(700, 0, 24, 24)
    for ranks in (1, 2, 3, 8, 24):
        share = 24 // ranks
        parts = [stream.batch(700, rank * share, share, 24) for rank in range(ranks)]
        assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(stream.batch(350, 0, 48, 48)[:24], whole), (
        "number 16,800 on, in other batches"
    )
    assert not np.array_equal(mix_domains(text(seed=6), 2.0).batch(700, 0, 24, 24), whole)
    assert stream.batch(0, 3, 0, 8).shape == (0, 8)


def test_the_temperature_is_read_from_the_config(texts: Path, tmp_path: Path) -> None:
    config = DataConfig(source=f"{texts}/odd,{texts}/even", seq_len=16, holdout=0.3)
    plain, flat = open_data(config, 3), open_data(replace(config, temperature=1e9), 3)
    assert isinstance(flat.train, MixtureDataset)
    assert not isinstance(plain.train, MixtureDataset)
    assert "drawn: even 50.0%, odd 50.0%" in flat.describe()
    prints = {open_data(replace(config, temperature=t), 3).fingerprint for t in (None, 1.0, 1e9)}
    assert len(prints) == 3, "a resumed run must not draw otherwise"
    prepare_shards(config, tmp_path / "shards", shard_tokens=3000)
    shards = open_data(
        replace(config, source=str(tmp_path / "shards"), temperature=1e9, document_mask=False), 3
    )
    assert shards.fingerprint == flat.fingerprint
    assert np.array_equal(shards.train.batch(9, 0, 64, 64), flat.train.batch(9, 0, 64, 64))
    assert np.array_equal(shards.train.labels(9, 0, 64, 64), flat.train.labels(9, 0, 64, 64))
    assert flat.sequences_per_domain() == plain.sequences_per_domain()


def test_weights_are_shares_from_text_and_from_shards(texts: Path, tmp_path: Path) -> None:
    source = f"{texts}/odd,{texts}/even"
    config = DataConfig(source, seq_len=16, holdout=0.3, weights={"odd": 3, "even": 1.0})
    text = open_data(config, 3)
    assert "drawn: even 25.0%, odd 75.0%" in text.describe()
    label_N = np.concatenate([text.train.labels(step, 0, 64, 64) for step in range(64)])
    assert (label_N == text.domains.index("odd")).sum() == 3 * BLOCK_SIZE // 4
    prepare_shards(config, tmp_path / "shards", shard_tokens=3000)
    mapped = replace(config, source=str(tmp_path / "shards"), document_mask=False)
    shards = open_data(mapped, 3)
    assert shards.fingerprint == text.fingerprint
    assert np.array_equal(shards.train.batch(9, 0, 64, 64), text.train.batch(9, 0, 64, 64))
    prints = {
        open_data(replace(config, weights={"odd": w, "even": 1}), 3).fingerprint for w in (1, 3)
    }
    assert len({*prints, text.fingerprint}) == 2, "a resumed run must not draw otherwise"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"odd": 1}, "data.weights=odd: .* even has none; set data.weights.even=1"),
        ({"odd": 1, "even": 1, "code": 1}, "has no domain of training named code; use even, odd"),
        ({"odd": 1, "even": 0}, "data.weights.even=0: must be above 0"),
    ],
)
def test_weights_that_do_not_fit(texts: Path, given: dict[str, float], message: str) -> None:
    config = DataConfig(f"{texts}/odd,{texts}/even", seq_len=16, holdout=0.3, weights=given)
    with pytest.raises(ConfigError, match=message):
        open_data(config, 0)
    both = replace(config, weights={"odd": 1, "even": 1}, temperature=2.0)
    with pytest.raises(ConfigError, match=r"data.temperature=2.0: .* and so does data.weights"):
        open_data(both, 0)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_must_be_above_0(texts: Path, temperature: float) -> None:
    with pytest.raises(ConfigError, match=rf"data.temperature={temperature}: must be above 0"):
        open_data(
            DataConfig(source=str(texts), seq_len=16, holdout=0.3, temperature=temperature), 0
        )
