"""The domain of the document in which a sequence starts: text, shards, synthetic data."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data import DatasetSplits, open_data, prepare_shards
from dmoe.data.packing import (
    PackedDataset,
    domain_labels,
    domain_runs,
    token_chunks,
)
from dmoe.data.sequences.held_out import HeldOutDataset
from dmoe.data.tokenizers import byte_tokenizer


@pytest.fixture
def config(texts: Path) -> DataConfig:
    """Two domains, the one that sorts last first in the stream."""
    return DataConfig(source=f"{texts}/odd,{texts}/even", seq_len=16, holdout=0.3)


def labels_from_text(data: DatasetSplits, texts: Path) -> list[int]:
    """Return labels of the held-out text in stored order, by searching for each file."""
    rows = stored(data).samples(0, stored(data).num_sequences)
    tokens = np.append(rows[:, :-1].ravel(), rows[-1, -1]).astype(np.uint8).tobytes()
    begins = {}
    for path in texts.rglob("*.txt"):
        # The opening separator belongs to the document; the unused tail may cut the last file.
        at = tokens.find(b"\0" + path.read_bytes()[:200])
        if at >= 0:
            begins[at] = data.domains.index(path.parent.name)
    return [
        begins[max(b for b in begins if b <= i * data.held_out.seq_len)] for i in range(len(rows))
    ]


def stored(data: DatasetSplits) -> PackedDataset:
    assert isinstance(data.held_out, HeldOutDataset)
    return data.held_out.packed


def test_a_row_has_the_domain_of_its_document(config: DataConfig, texts: Path) -> None:
    data = open_data(config, 0)
    assert data.domains == ("even", "odd")
    label_B = stored(data).sample_labels(0, stored(data).num_sequences)
    assert label_B.dtype == np.int64
    assert label_B[0] == 1, "odd is the first entry"
    assert set(label_B.tolist()) == {0, 1}
    assert label_B.tolist() == labels_from_text(data, texts)
    assert stored(data).sample_labels(3, 4).tolist() == label_B[3:7].tolist()


def test_a_batch_has_the_labels_of_its_rows() -> None:
    """Token j of the stream is j, so a row's first token is where it starts."""
    runs = ((0, 1), (350, 0), (777, 2))
    train = PackedDataset(
        [np.arange(500, dtype="<u4"), np.arange(500, 1000, dtype="<u4")], 16, 5, 1000, "train", runs
    )
    for step in (0, 7, 60):
        got_B = train.labels(step, 2, 30, 40)
        assert got_B.shape == (30,)
        assert got_B.dtype == np.int64
        assert got_B.tolist() == domain_labels(train.batch(step, 2, 30, 40)[:, 0], runs).tolist()
        assert set(got_B.tolist()) == {0, 1, 2}
    assert train.labels(0, 4, 0, 4).shape == (0,)


@settings(max_examples=80, deadline=None)
@given(
    documents=st.lists(
        st.tuples(st.binary(min_size=1, max_size=12), st.sampled_from("abc")),
        min_size=1,
        max_size=8,
    ),
    seq_len=st.integers(1, 7),
)
def test_labels_equal_the_walk_along_the_stream(
    documents: list[tuple[bytes, str]], seq_len: int
) -> None:
    chunks = list(token_chunks([content for content, _ in documents], byte_tokenizer()))
    domains = [domain for _, domain in documents]
    names = sorted(set(domains))
    owner = [names.index(domains[0])]  # the separator that opens the stream
    for number, chunk in enumerate(chunks[1:]):
        following = domains[min(number + 1, len(domains) - 1)]
        owner += [names.index(domains[number])] * (len(chunk) - 1) + [names.index(following)]
    runs = domain_runs([len(chunk) for chunk in chunks[1:]], domains, names)
    stream = np.concatenate(chunks)
    assert len(owner) == len(stream)
    assert domain_labels(np.arange(len(stream) - 1), runs).tolist() == owner[:-1]
    if len(stream) > seq_len:
        packed = PackedDataset([stream], seq_len, 0, 256, "train", runs)
        assert (
            packed.sample_labels(0, packed.num_sequences).tolist()
            == owner[:-1][::seq_len][: packed.num_sequences]
        )


def test_shards_keep_the_labels(config: DataConfig, tmp_path: Path) -> None:
    prepare_shards(config, tmp_path / "shards", shard_tokens=3000)
    text, shards = (
        open_data(config, 3),
        open_data(replace(config, source=str(tmp_path / "shards"), document_mask=False), 3),
    )
    assert shards.fingerprint == text.fingerprint
    assert shards.domains == text.domains
    assert np.array_equal(shards.train.labels(5, 0, 64, 64), text.train.labels(5, 0, 64, 64))
    assert np.array_equal(shards.held_out.sample_labels(0, 40), text.held_out.sample_labels(0, 40))


def damage(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


def test_shards_without_domains_have_one(config: DataConfig, tmp_path: Path) -> None:
    prepare_shards(config, tmp_path / "shards")

    def forget(body: dict[str, Any]) -> None:
        del body["domains"]
        for split in body["splits"].values():
            del split["runs"]

    damage(tmp_path / "shards" / "index.json", forget)
    data = open_data(replace(config, source=str(tmp_path / "shards")), 0)
    assert data.domains == ("text",)
    assert not data.train.labels(0, 0, 50, 50).any()


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(domains=[]),
        lambda body: body.update(domains=["odd", "even"]),
        lambda body: body.update(domains=["even", 3]),
        lambda body: body.update(domains=["even"]),  # a run names a domain that is not there
        lambda body: body["splits"]["train"].update(runs=[]),
        lambda body: body["splits"]["train"].update(runs=[[5, 0]]),
        lambda body: body["splits"]["train"].update(runs=[[0, 0], [9, 1], [9, 0]]),
        lambda body: body["splits"]["train"].update(runs=[[0, -1]]),
        lambda body: body["splits"]["train"].update(runs=[[0, True]]),
        lambda body: body["splits"]["train"].update(runs=[[0, 0, 0]]),
        lambda body: body["splits"]["train"].update(runs=7),
    ],
)
def test_a_damaged_domain_list_is_refused(
    config: DataConfig, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    prepare_shards(config, tmp_path / "shards")
    damage(tmp_path / "shards" / "index.json", change)
    with pytest.raises(ConfigError, match=r"index.json is wrong at"):
        open_data(replace(config, source=str(tmp_path / "shards")), 0)


def test_synthetic_streams_have_one_domain() -> None:
    data = open_data(DataConfig(source="synthetic:zipf", seq_len=8), 0)
    assert data.domains == ("zipf",)
    assert data.train.labels(3, 2, 4, 8).tolist() == [0] * 4
    assert data.held_out.sample_labels(9, 2).tolist() == [0] * 2


def test_the_default_corpus_has_one_domain() -> None:
    data = open_data(DataConfig(), 0)
    assert data.domains == ("python",)
    assert not data.train.labels(0, 0, 24, 24).any()
