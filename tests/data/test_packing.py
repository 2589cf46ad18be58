from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.config.errors import ConfigError
from dmoe.data.packing import PackedDataset, token_chunks, token_dtype, token_hash
from dmoe.data.tokenizers import byte_tokenizer


def packed_dataset(parts: list[np.ndarray], seq_len: int, seed: int = 0) -> PackedDataset:
    return PackedDataset(parts, seq_len, seed, 256, "train")


@settings(max_examples=80, deadline=None)
@given(
    documents=st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=6),
    seq_len=st.integers(1, 12),
)
def test_every_token_is_a_target_once(documents: list[bytes], seq_len: int) -> None:
    """Token j of the stream is j, so the targets read are the positions read."""
    length = sum(len(chunk) for chunk in token_chunks(documents, byte_tokenizer()))
    position = np.arange(length, dtype=np.uint32)
    if length <= seq_len:
        return
    packed = PackedDataset([position], seq_len, 0, length, "train")
    row_BS = packed.samples(0, packed.num_sequences)
    targets = row_BS[:, 1:].ravel()
    assert np.array_equal(targets, np.arange(1, 1 + packed.num_sequences * seq_len))
    assert length - 1 - len(targets) < seq_len, "the tail left out is shorter than a sequence"
    assert np.array_equal(row_BS[:, :-1].ravel(), targets - 1), (
        "the input of each target is the token before it"
    )
    shuffled = packed.batch(0, 0, packed.num_sequences, packed.num_sequences)[:, 1:].ravel()
    assert np.array_equal(np.sort(shuffled), targets), "an epoch has the same targets"


def test_the_stream_is_documents_between_separators() -> None:
    token_N = np.concatenate(list(token_chunks([b"ab", b"c"], byte_tokenizer())))
    assert token_N.tolist() == [0, 97, 98, 0, 99, 0]
    assert token_N.dtype == np.dtype("<u2")


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(3, 80),
    cuts=st.lists(st.integers(0, 80), max_size=6),
    seq_len=st.integers(1, 10),
)
def test_cutting_the_stream_changes_nothing(length: int, cuts: list[int], seq_len: int) -> None:
    token_N = (np.arange(length) * 37 % 251).astype("<u2")
    parts = np.split(token_N, sorted(cut for cut in cuts if cut <= length))
    if length <= seq_len:
        return
    whole, cut = packed_dataset([token_N], seq_len, 5), packed_dataset(parts, seq_len, 5)
    assert whole.num_sequences == cut.num_sequences == (length - 1) // seq_len
    assert np.array_equal(
        whole.samples(0, whole.num_sequences), cut.samples(0, whole.num_sequences)
    )
    assert np.array_equal(whole.batch(3, 0, 7, 7), cut.batch(3, 0, 7, 7))
    assert token_hash([token_N]) == token_hash(parts)


def test_ranks_read_slices_of_the_same_batch() -> None:
    packed = packed_dataset([np.arange(250, dtype="<u2")], seq_len=4)
    whole_BS = packed.batch(9, 0, 12, 12)
    assert whole_BS.shape == (12, 5)
    assert whole_BS.dtype == np.int64
    for ranks in (2, 3, 4, 6):
        share = 12 // ranks
        assert np.array_equal(
            np.concatenate([packed.batch(9, r * share, share, 12) for r in range(ranks)]), whole_BS
        )
    assert packed.batch(9, 12, 0, 12).shape == (0, 5)


def test_samples_do_not_wrap() -> None:
    packed = packed_dataset([np.arange(21, dtype="<u2")], seq_len=4)
    assert packed.samples(4, 1).tolist() == [[16, 17, 18, 19, 20]]
    with pytest.raises(AssertionError):
        packed.samples(4, 2)


def test_a_corpus_shorter_than_a_sequence_is_refused() -> None:
    assert packed_dataset([np.arange(10, dtype="<u2")], seq_len=9).num_sequences == 1
    with pytest.raises(
        ConfigError,
        match=r"data.seq_len=10: must be less than the 10 tokens of the train split; "
        "set data.seq_len=9",
    ):
        packed_dataset([np.arange(10, dtype="<u2")], seq_len=10)


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    packed = packed_dataset([np.array([1, 2, 300, 4, 5, 6], dtype="<u2")], seq_len=2)
    with pytest.raises(ConfigError, match=r"the train split: must hold tokens below 256, not 300"):
        packed.samples(0, 1)
    assert packed.samples(0, 0).shape == (0, 3)


def test_the_stored_type_fits_the_vocabulary() -> None:
    assert token_dtype(65_536) == np.dtype("<u2")
    assert token_dtype(65_537) == np.dtype("<u4")
