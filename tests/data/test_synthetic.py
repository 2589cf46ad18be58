from __future__ import annotations

import numpy as np
import pytest

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data import open_data
from dmoe.data.synthetic import KINDS, SyntheticDataset, zipf_probability


def train(kind: str, seq_len: int = 32, seed: int = 0) -> SyntheticDataset:
    return SyntheticDataset(kind, seq_len, seed, "train")


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_is_a_function_of_seed_split_and_number(kind: str) -> None:
    data = open_data(DataConfig(source=f"synthetic:{kind}", seq_len=32), 5)
    whole_BS = data.train.batch(3, 0, 8, 8)
    assert whole_BS.shape == (8, 33)
    assert whole_BS.dtype == np.int64
    assert whole_BS.min() >= 1
    assert whole_BS.max() <= 255
    assert np.array_equal(
        np.concatenate([data.train.batch(3, 0, 3, 8), data.train.batch(3, 3, 5, 8)]), whole_BS
    )
    assert np.array_equal(data.train.samples(24, 8), whole_BS)
    assert data.train.num_sequences is None
    others = [
        data.held_out.batch(3, 0, 8, 8),
        data.train.batch(4, 0, 8, 8),
        train(kind, 32, 6).batch(3, 0, 8, 8),
    ]
    for other_BS in others:
        assert (other_BS == whole_BS).mean() < 0.2
    assert f"synthetic:{kind}" in data.describe()


def test_uniform_is_uniform() -> None:
    count = np.bincount(train("uniform", 255).samples(0, 1000).ravel(), minlength=256)[1:]
    expected = 256_000 / 255
    assert ((count - expected) ** 2 / expected).sum() < 254 + 5 * np.sqrt(2 * 254)


def test_zipf_has_its_law() -> None:
    count = np.bincount(train("zipf", 255).samples(0, 1000).ravel(), minlength=256)[1:]
    expected = 256_000 * zipf_probability()
    assert ((count - expected) ** 2 / expected).sum() < 254 + 5 * np.sqrt(2 * 254)


@pytest.mark.parametrize("seq_len", [1, 2, 7, 32])
def test_copy_repeats_its_first_half(seq_len: int) -> None:
    token_BS = train("copy", seq_len).samples(0, 5)
    half = (seq_len + 2) // 2
    assert np.array_equal(token_BS[:, half:], token_BS[:, : seq_len + 1 - half])


def test_bad_kinds_and_tokenizers_are_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"data.source=synthetic:cauchy: must be one of synthetic:uniform, synthetic:zipf",
    ):
        open_data(DataConfig(source="synthetic:cauchy"), 0)


def test_a_tokenizer_other_than_bytes_is_refused(rank_file) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(
        ConfigError, match=r"data.tokenizer=.*must be bytes for data.source=synthetic:zipf"
    ):
        open_data(DataConfig(source="synthetic:zipf", tokenizer=str(rank_file)), 0)
