"""Positions in documents equal a walk over the tokens; when the mask is on; what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.config.rules import check
from dmoe.config.schema import DataConfig
from dmoe.data import open_data, open_documents, prepare_shards
from dmoe.data.packing import PackedDataset
from dmoe.data.sequences.held_out import HeldOutDataset
from dmoe.data.sequences.token_masks import positions_in_documents

TEXTS = ["a" * n + "b" for n in (1, 3, 9, 2, 2, 40, 5, 1, 7, 12, 6, 3, 11, 4, 8, 2, 30, 5)]


def walk(token_S: list[int], separator: int) -> list[int]:
    """Count from the last separator, or from the first token."""
    position, found = 0, []
    for s, token in enumerate(token_S):
        position = 0 if s == 0 or token == separator else position + 1
        found.append(position)
    return found


@pytest.mark.parametrize("seq_len", [1, 5, 16])
def test_positions_equal_a_walk_over_the_tokens(seq_len: int) -> None:
    """In training order, in stored order and for a mixture; a separator opens its document."""
    config = DataConfig(seq_len=seq_len, holdout=0.3, document_mask=True)
    for temperature in (None, 3.0):
        data = open_documents(DataConfig(**vars(config) | {"temperature": temperature}), 1, TEXTS)
        for dataset in (data.train, data.held_out):
            tokens = dataset.batch(1, 2, 5, 8), dataset.samples(0, 2)
            masks = dataset.masks(1, 2, 5, 8), dataset.sample_masks(0, 2)
            for token_BS, (position_BS, predicted_BS, valid_BS) in zip(tokens, masks, strict=True):
                assert position_BS is not None
                assert predicted_BS is None
                assert valid_BS is None
                assert position_BS.tolist() == [walk(row[:-1], 0) for row in token_BS.tolist()]


def test_starts_are_where_the_lengths_say() -> None:
    train = packed(open_documents(DataConfig(seq_len=8, holdout=0.3), 0, TEXTS).train)
    assert train.document_start_N is not None
    stream = np.concatenate(train.arrays).tolist()
    lengths = [len(text) for text in bytes(stream).split(b"\0")[1:-1]]
    assert (
        train.document_start_N.tolist() == np.cumsum([0, *[n + 1 for n in lengths]])[:-1].tolist()
    )
    assert not train.document_mask, "raw text is not masked by default"


def test_starts_may_be_a_memory_map_far_longer_than_a_sequence(tmp_path: Path) -> None:
    np.cumsum(np.full(10_000, 7)).astype("<i8").tofile(tmp_path / "starts")
    start_N = np.memmap(tmp_path / "starts", "<i8", "r") - 7
    found = positions_in_documents(np.array([0, 33, 69_990]), 8, start_N)
    assert found.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 0],
        [0, 1, 0, 1, 2, 3, 4, 5],
        [0, 1, 2, 0, 1, 2, 3, 4],
    ]


def test_text_for_evaluation_alone_has_documents_too(texts: Path) -> None:
    config = DataConfig(
        f"{texts}/even", seq_len=64, holdout=0.3, document_mask=True, eval_source=f"{texts}/odd"
    )
    data = open_data(config, 0)
    assert data.eval_only
    count = data.held_out.num_sequences or 0
    position_BS = data.held_out.sample_masks(0, count).position_BS
    assert position_BS is not None
    tokens = data.held_out.samples(0, count).tolist()
    assert position_BS.tolist() == [walk(row[:-1], 0) for row in tokens]
    assert (data.held_out.sample_labels(0, count) == data.domains.index("odd")).any()


def test_the_mask_is_part_of_what_the_run_is_trained_on(texts: Path) -> None:
    """The tokens are the same; a resumed run that would be masked otherwise is refused."""
    config = DataConfig(str(texts), seq_len=64)
    plain, masked = (
        open_data(DataConfig(**vars(config) | {"document_mask": mask}), 0) for mask in (None, True)
    )
    assert (plain.document_mask, masked.document_mask) == (False, True)
    assert plain.fingerprint != masked.fingerprint
    assert np.array_equal(plain.train.batch(0, 0, 4, 4), masked.train.batch(0, 0, 4, 4))
    assert plain.train.masks(0, 0, 4, 4) == (None, None, None)
    assert "documents do not see each other" in masked.describe()


def test_shards_without_boundaries_cannot_be_masked(texts: Path, tmp_path: Path) -> None:
    prepare_shards(DataConfig(str(texts)), tmp_path / "shards")
    config = DataConfig(str(tmp_path / "shards"), seq_len=64)
    data = open_data(config, 0)
    if packed(data.train).document_start_N is not None:
        assert data.document_mask, "known boundaries turn the mask on"
        return
    assert not data.document_mask
    with pytest.raises(ConfigError, match=r"data\.document_mask=True.*prepare them again"):
        open_data(DataConfig(**vars(config) | {"document_mask": True}), 0)


@pytest.mark.parametrize("bank", ["prompt", "prefix"])
def test_positions_in_front_of_a_sequence_are_refused(bank: str) -> None:
    """Only its first document would see them."""
    with pytest.raises(ConfigError, match=rf"data\.document_mask=True.*modular\.bank={bank}"):
        check(load(None, ["data.document_mask=true", f"modular.bank={bank}"]))


def packed(dataset: object) -> PackedDataset:
    found = dataset.packed if isinstance(dataset, HeldOutDataset) else dataset
    assert isinstance(found, PackedDataset)
    return found
