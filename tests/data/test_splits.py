"""Few documents are cut, data.validation_source names the held-out split."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data import open_data, prepare_shards
from dmoe.data.corpus import Corpus, Document
from dmoe.data.packing import PackedDataset
from dmoe.data.sequences.held_out import HeldOutDataset
from dmoe.data.splits import FEW, split_corpus


def books(path: Path, numbers: range) -> Path:
    path.write_text(
        "".join(json.dumps({"text": f"book {n}: " + f"é{n} " * 50}) + "\n" for n in numbers)
    )
    return path


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("aé専😀", max_size=30), min_size=1, max_size=FEW - 1),
    st.floats(0.01, 0.99),
)
def test_few_documents_are_cut_at_characters(texts: list[str], share: float) -> None:
    """Two files had no held-out one, or lost half of the text to it."""
    documents = tuple(Document(text.encode(), str(n), "x") for n, text in enumerate(texts))
    sizes = [len(text.encode()) for text in texts]
    if all(size * min(share, 1 - share) < 4 for size in sizes):  # too short to be cut, perhaps
        return
    train, held_out = split_corpus(Corpus(documents), share)
    ends = {document.name: document.content for document in held_out.documents}
    assert [document.name for document in train.documents] == [d.name for d in documents]
    for begin, text in zip(train.documents, texts, strict=True):
        end = ends.get(begin.name, b"")
        assert (begin.content + end).decode() == text
        begin.content.decode()
        end.decode()
        size = len(text.encode())
        if end:
            assert size * share - 1 <= len(end) <= size * share + 4
    assert split_corpus(Corpus(documents), share)[1] == held_out


def test_from_fifty_documents_on_whole_ones_are_held_out() -> None:
    documents = tuple(Document(b"text %d" % n * 9, str(n), "x") for n in range(FEW))
    train, held_out = split_corpus(Corpus(documents), 0.3)
    assert {*train.documents, *held_out.documents} == {*documents}
    few, _ = split_corpus(Corpus(documents[1:]), 0.3)
    assert few.notes == ("49 documents, fewer than 50: the last 30.00% of each held out",)


def test_bytes_that_are_no_text_are_cut_too() -> None:
    """All are continuation bytes, and the search for a character went back to the first."""
    train, held_out = split_corpus(Corpus((Document(b"\x80" * 100, "a", "x"),)), 0.1)
    assert len(held_out.documents[0].content) == 13
    assert len(train.documents[0].content) == 87


def stream(data: HeldOutDataset | PackedDataset) -> str:
    packed = data.packed if isinstance(data, HeldOutDataset) else data
    rows = packed.samples(0, packed.num_sequences)
    return bytes(rows[:, 1:].ravel().astype(np.uint8)).decode("utf-8", "replace")


def test_validation_files_are_the_held_out_split(tmp_path: Path) -> None:
    """A document of both is held out, and that is said; data.holdout is not used."""
    source = books(tmp_path / "train.jsonl", range(10))
    validation = books(tmp_path / "val.jsonl", range(8, 12))
    config = DataConfig(str(source), seq_len=16, validation_source=str(validation))
    data = open_data(config, 0)
    train, held_out = stream(data.train), stream(data.held_out)
    assert [n for n in range(12) if f"book {n}:" in train] == [*range(8)]
    assert [n for n in range(12) if f"book {n}:" in held_out] == [*range(8, 12)]
    described = data.describe()
    assert described.startswith(f"{source}: 1 file, 8 documents, ")
    assert f"held out: {validation}, 1 file, 4 documents, 0.0 MB; " in described
    assert "documents of data.validation_source left out of training (2)" in described
    assert "of each held out" not in described
    assert data.domains == ("train", "val")
    again = open_data(replace(config, holdout=0.5), 0)
    assert "data.holdout=0.5 is not used" in again.describe()
    assert stream(again.train) == train
    books(validation, range(8, 13))
    assert open_data(config, 0).fingerprint != data.fingerprint
    whole = books(tmp_path / "all.jsonl", range(10))
    with pytest.raises(ConfigError, match=r"data\.validation_source=.* holds every document of"):
        open_data(replace(config, validation_source=str(whole)), 0)
    with pytest.raises(ConfigError, match=r"data\.validation_source=none\.txt: .*no such file"):
        open_data(replace(config, validation_source="none.txt"), 0)


def test_records_may_be_evaluated_beside_plain_text(tmp_path: Path) -> None:
    """data.text_field is then of one of the sources only."""
    lines = books(tmp_path / "val.jsonl", range(3))
    lines.write_text(lines.read_text().replace('"text"', '"body"'))
    text = tmp_path / "a.txt"
    text.write_text("other text " * 50)
    for source, field in ((text, lines), (lines, text)):
        for name in ("validation_source", "eval_source"):
            config = DataConfig(str(source), seq_len=8, text_field="body", **{name: str(field)})  # type: ignore[arg-type]
            assert (open_data(config, 0).held_out.num_sequences or 0) > 0
    with pytest.raises(ConfigError, match=r"data\.text_field=body: is a field of records"):
        open_data(DataConfig(str(text), seq_len=8, text_field="body"), 0)


def test_shards_of_records_give_the_same_sequences(tmp_path: Path) -> None:
    source = books(tmp_path / "train.jsonl", range(10))
    validation = books(tmp_path / "val.jsonl", range(8, 12))
    for number, config in enumerate(
        (
            DataConfig(str(source), seq_len=16),
            DataConfig(str(source), seq_len=16, validation_source=str(validation)),
        )
    ):
        directory = tmp_path / f"shards{number}"
        index = prepare_shards(config, directory)
        shards = open_data(DataConfig(str(directory), seq_len=16, document_mask=False), 0)
        assert shards.fingerprint == open_data(config, 0).fingerprint
        counts = [index.splits[split].documents for split in ("train", "held_out")]
        assert counts == ([10, 0], [8, 4])[number]


@pytest.mark.parametrize("field", ["text_field", "label_field", "validation_source"])
def test_fields_that_a_source_does_not_read_are_refused(field: str, tmp_path: Path) -> None:
    source = books(tmp_path / "train.jsonl", range(10))
    prepare_shards(DataConfig(str(source), seq_len=16), tmp_path / "shards")
    for name in ("synthetic:zipf", str(tmp_path / "shards")):
        with pytest.raises(ConfigError, match=rf"data\.{field}=x: has no meaning for "):
            open_data(DataConfig(name, seq_len=16, **{field: "x"}), 0)  # type: ignore[arg-type]
