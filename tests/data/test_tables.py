"""Tables of labelled samples: features by formula, held-out samples, order."""

from __future__ import annotations

import hashlib
import math
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from dmoe.config.datasets import DATASETS
from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data import tables
from dmoe.data.order import sequence_indices
from dmoe.data.tables import (
    TableDataset,
    TableSplits,
    digits,
    num_classes,
    open_table,
    stream_widths,
)

SKLEARN = [source for source in DATASETS if source.startswith("sklearn:")]
FIXED_FEATURES = "76535dc00de35ade"
CLUSTERS = DataConfig(source="synthetic:clusters", streams=["a", "b"])


def opened(source: str, holdout: float = 0.2, seed: int = 0, **options: object) -> TableSplits:
    if source.startswith("sklearn:"):
        pytest.importorskip(
            "sklearn", reason="scikit-learn, an optional dependency, is not installed"
        )
    config = DataConfig(source=source, holdout=holdout, **options)  # type: ignore[arg-type]
    return open_table(config, seed)


@pytest.mark.parametrize("source", DATASETS)
def test_what_is_known_beforehand_is_what_is_found(source: str) -> None:
    every = list(DATASETS[source].streams)
    for streams in ([], every, every[::-1], every[-1:]):
        config = DataConfig(source=source, streams=streams, holdout=0.2)
        found = opened(source, streams=streams)
        x_BW, class_B = found.train.samples(0, found.train.num_sequences or 100)
        assert list(found.widths) == (streams or every[:1])
        assert found.widths == stream_widths(config)
        assert x_BW.shape == (len(class_B), sum(stream_widths(config).values()))
        assert x_BW.dtype == np.float32
        assert class_B.dtype == np.int64
        assert set(class_B.tolist()) == set(range(num_classes(config)))
        assert found.classes == len(found.domains) == num_classes(config)


@pytest.mark.parametrize("source", SKLEARN)
def test_classes_have_their_names(source: str) -> None:
    datasets = pytest.importorskip(
        "sklearn.datasets", reason="scikit-learn, an optional dependency, is not installed"
    )
    names = getattr(datasets, f"load_{source.removeprefix('sklearn:')}")().target_names
    assert tuple(map(str, names)) == DATASETS[source].classes


def strokes_of_one(image: np.ndarray) -> list[float]:
    """The formula, pixel by pixel, with the angle itself."""
    found = [0.0] * 20
    for row in range(8):
        for column in range(8):
            at = {(r, c): int(image[r, c]) for r in range(8) for c in range(8)}
            gx = at.get((row, column + 1), 0) - at.get((row, column - 1), 0)
            gy = at.get((row + 1, column), 0) - at.get((row - 1, column), 0)
            quadrant = 5 * (2 * (row // 4) + column // 4)
            if gx == gy == 0:
                found[quadrant + 4] += 1 / 16
                continue
            degrees = (
                round(math.degrees(math.atan2(gy, gx)), 9) % 180
            )  # exact on the borders of the bins
            found[quadrant + int(degrees // 45)] += (abs(gx) + abs(gy)) / 64
    return found


def test_features_are_their_formulas() -> None:
    image_NHW = np.random.default_rng(0).integers(0, 17, (6, 8, 8)).astype(np.float64)
    image_NHW[1], image_NHW[2] = (
        0,
        np.arange(8)[:, None],
    )  # nothing at all; every gradient downwards
    image_NHW[3] = np.arange(8)[:, None] + np.arange(8)  # every gradient at 45 degrees
    for n, image in enumerate(image_NHW):
        assert digits.strokes(image_NHW)[n].tolist() == strokes_of_one(image)
        rows = [sum(image[r]) / 128 for r in range(8)]
        columns = [sum(image[:, c]) / 128 for c in range(8)]
        assert digits.profiles(image_NHW)[n].tolist() == rows + columns
        assert digits.pixels(image_NHW)[n].tolist() == [
            pixel / 16 for row in image for pixel in row
        ]


def test_features_need_no_fitting_and_stay_as_they_are() -> None:
    """A change of a formula silently invalidates every trained model, so the hashes are fixed."""
    image_NHW = (np.arange(192) * 7 % 17).reshape(3, 8, 8).astype(np.float64)
    found = b"".join(
        feature(image_NHW).astype("<f8").tobytes() for feature in digits.DIGIT_FEATURES.values()
    )
    assert hashlib.sha256(found).hexdigest()[:16] == FIXED_FEATURES


def test_digits_are_read_as_they_are() -> None:
    datasets = pytest.importorskip(
        "sklearn.datasets", reason="scikit-learn, an optional dependency, is not installed"
    )
    loaded, found = datasets.load_digits(), opened("sklearn:digits", streams=["pixels", "strokes"])
    x_NW, class_N = (
        np.concatenate(parts)
        for parts in zip(found.train.samples(0, 1438), found.held_out.samples(0, 359), strict=True)
    )
    theirs = Counter(
        (row.tobytes(), label) for row, label in zip(loaded.data, loaded.target, strict=True)
    )
    ours = Counter(
        ((row[:64] * 16.0).astype(np.float64).tobytes(), label)
        for row, label in zip(x_NW, class_N, strict=True)
    )
    assert ours == theirs
    images = (x_NW[:, :64] * 16).reshape(-1, 8, 8)
    assert np.array_equal(x_NW[:, 64:], digits.strokes(images).astype(np.float32))


@pytest.mark.parametrize("source", ["sklearn:wine", "sklearn:breast_cancer"])
def test_measurements_are_standardised_by_the_training_split(source: str) -> None:
    found = opened(source)
    x_NW, _ = found.train.samples(0, found.train.num_sequences or 0)
    assert np.abs(x_NW.mean(0)).max() < 1e-5
    assert np.abs(x_NW.std(0) - 1).max() < 1e-5
    held_NW, _ = found.held_out.samples(0, found.held_out.num_sequences or 0)
    assert np.abs(held_NW.mean(0)).max() > 0.01, "the held-out samples were read to find the scale"


def stub(monkeypatch: pytest.MonkeyPatch, rows: list[list[float]], labels: list[int]) -> None:
    raw_NW = np.array(rows)
    monkeypatch.setattr(
        tables, "_read", lambda source: (raw_NW, np.array(labels), {"features": raw_NW})
    )
    monkeypatch.setattr(
        tables, "_standardize", lambda streams, name, kept_N, train_N: streams[name][kept_N]
    )


WINE = DataConfig(source="sklearn:wine", holdout=0.3)


def test_the_split_follows_content_and_duplicates_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is added, removed or moved, no other sample changes sides, and none is on both."""
    rows, labels = [[float(n), n * 0.5] for n in range(60)], [n % 3 for n in range(60)]
    stub(monkeypatch, rows, labels)
    whole = open_table(WINE, 0)
    sides = [
        {tuple(row) for row in side.samples(0, side.num_sequences or 0)[0].tolist()}
        for side in (whole.train, whole.held_out)
    ]
    assert len(sides[0]) + len(sides[1]) == 60
    assert 8 < len(sides[1]) < 30
    stub(
        monkeypatch,
        rows[:20:-1] + rows[30:35] + [[-1.0, 2.0]],
        labels[:20:-1] + labels[30:35] + [0],
    )
    other = open_table(WINE, 0)
    for side, before in zip((other.train, other.held_out), sides, strict=True):
        values_NW, class_N = side.samples(0, side.num_sequences or 0)
        now = list(map(tuple, values_NW.tolist()))
        assert len(set(now)) == len(now)
        assert {row for row in now if row[0] >= 0} == {row for row in before if row[0] > 20}
        assert all(
            label == int(row[0]) % 3 for row, label in zip(now, class_N, strict=True) if row[0] >= 0
        )
    assert "5 exact duplicates removed" in other.describe()


def test_a_fingerprint_is_of_contents_streams_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = [[float(n), n * 0.5] for n in range(60)], [n % 3 for n in range(60)]
    stub(monkeypatch, rows, labels)
    prints = [
        open_table(WINE, 0).fingerprint,
        open_table(replace(WINE, holdout=0.4), 0).fingerprint,
    ]
    assert open_table(WINE, 5).fingerprint == prints[0], "the order is no content"
    for changed_rows, changed_labels in (
        ([*rows[:-1], [9.5, 9.5]], labels),
        (rows, [*labels[:-1], 0]),
    ):
        stub(monkeypatch, changed_rows, changed_labels)
        prints.append(open_table(WINE, 0).fingerprint)
    assert len(set(prints)) == 4
    clusters = [
        replace(CLUSTERS, streams=streams) for streams in (["a"], ["b"], ["a", "b"], ["b", "a"])
    ]
    assert (
        len({open_table(config, seed).fingerprint for config in clusters for seed in (0, 1)}) == 8
    )


def test_the_order_is_a_function_of_seed_step_and_index() -> None:
    stream = TableDataset(np.arange(37, dtype=np.float32)[:, None], np.arange(37), seed=3)
    x_BW, class_B = stream.batch(11, 0, 24, 24)
    assert np.array_equal(x_BW[:, 0], class_B)
    assert np.array_equal(class_B, sequence_indices(11, 0, 24, 24, 37, 3))
    parts = [stream.batch(11, first, 8, 24)[1] for first in (0, 8, 16)]
    assert np.array_equal(np.concatenate(parts), class_B)
    epoch = np.concatenate([stream.batch(step, 0, 37, 37)[1] for step in range(2)])
    assert sorted(epoch[:37]) == sorted(epoch[37:]) == list(range(37))
    assert not np.array_equal(epoch[:37], epoch[37:])
    with pytest.raises(AssertionError):
        stream.samples(30, 8)


def test_clusters_are_a_function_of_seed_split_and_number() -> None:
    found = open_table(CLUSTERS, 5)
    x_BW, class_B = found.train.batch(3, 0, 8, 8)
    assert found.train.num_sequences is None
    assert np.array_equal(
        np.concatenate([found.train.batch(3, first, 4, 8)[0] for first in (0, 4)]), x_BW
    )
    assert np.array_equal(found.train.samples(24, 8)[0], x_BW)
    assert np.array_equal(found.train.samples(24, 8)[1], class_B)
    for other in (
        found.held_out.samples(24, 8)[0],
        found.train.samples(32, 8)[0],
        open_table(CLUSTERS, 6).train.samples(24, 8)[0],
    ):
        assert not (other == x_BW).any()
    turned = open_table(replace(CLUSTERS, streams=["b", "a"]), 5).train.samples(24, 8)[0]
    assert np.array_equal(np.concatenate([turned[:, 7:], turned[:, :7]], 1), x_BW)


def test_clusters_are_normal_around_their_centres() -> None:
    x_NW, class_N = open_table(CLUSTERS, 0).train.samples(0, 20_000)
    assert np.abs(np.bincount(class_N) / 4000 - 1).max() < 0.06
    noise_NW = np.concatenate([x_NW[class_N == c] - x_NW[class_N == c].mean(0) for c in range(5)])
    assert np.abs(noise_NW.std(0) - 1).max() < 0.03
    assert abs(x_NW.mean()) < 0.3
    assert abs((noise_NW > 1.6449).mean() - 0.05) < 0.003
    assert np.abs(np.corrcoef(noise_NW.T) - np.eye(19)).max() < 0.05
    assert np.linalg.norm(x_NW[class_N == 0].mean(0) - x_NW[class_N == 1].mean(0)) > 1


def test_without_scikit_learn_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(
        ConfigError,
        match=r"data\.source=sklearn:digits: needs scikit-learn.*; pip install scikit-learn$",
    ):
        open_table(DataConfig(source="sklearn:digits"), 0)
    assert stream_widths(DataConfig(source="sklearn:digits")) == {"pixels": 64}


@pytest.mark.parametrize("holdout", [1e-9, 1 - 1e-9])
def test_a_split_without_a_side_is_refused(monkeypatch: pytest.MonkeyPatch, holdout: float) -> None:
    stub(monkeypatch, [[float(n), 1.0] for n in range(9)], [0] * 9)
    with pytest.raises(ConfigError, match=r"data\.holdout=.*must leave samples to both sides"):
        open_table(replace(WINE, holdout=holdout), 0)
