"""Files of tokens that other programs write: mapped, prepared, and refused when damaged."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data import open_data, prepare_shards
from dmoe.data.shard_index import SPLITS, read_index
from dmoe.data.shards import map_documents, map_shards
from dmoe.data.token_streams import masks_by_default

CODES = {"<u2": 8, "<i4": 4, "|u1": 1, "<i8": 5}
DOCUMENTS = [[5 + n % 40, *range(20, 40 + n), 10 + n % 7] for n in range(70)]
"""Tokens of bytes, without the separator 0."""


def write_megatron(
    path: Path, documents: list[list[list[int]]], dtype: str = "<u2", separator: bool = True
) -> Path:
    """Write `NAME.bin` and `NAME.idx` by the published layout, field by field.

    A document is a list of sequences; with `separator` its last one ends with token 0.
    """
    sequences = [
        [*sequence, 0] if separator and sequence is document[-1] else sequence
        for document in documents
        for sequence in document
    ]
    width = np.dtype(dtype).itemsize
    path.with_suffix(".bin").write_bytes(
        b"".join(np.array(sequence, dtype).tobytes() for sequence in sequences)
    )
    lengths = [len(sequence) for sequence in sequences]
    pointers = [width * sum(lengths[:n]) for n in range(len(lengths))]
    boundaries = [sum(map(len, documents[:n])) for n in range(len(documents) + 1)]
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(boundaries))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(boundaries)}q", *boundaries)
    )
    return path.with_suffix(".bin")


def write_nanogpt(path: Path, documents: list[list[int]]) -> Path:
    """Write one stream of uint16, with token 0 after each document."""
    stream = [token for document in documents for token in (*document, 0)]
    path.write_bytes(struct.pack(f"<{len(stream)}H", *stream))
    return path


def documents_of(directory: Path, name: str) -> list[list[int]]:
    index = read_index(directory)
    tokens = np.concatenate(map_shards(directory, index, name)).tolist()
    starts = map_documents(directory, index, name)
    assert starts is not None
    ends = [*starts.tolist()[1:], len(tokens) - 1]
    return [tokens[a + 1 : b] for a, b in zip(starts.tolist(), ends, strict=True)]


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("separator", [True, False])
def test_megatron_is_mapped(tmp_path: Path, dtype: str, separator: bool) -> None:
    """The stream is the file; its end, from a document on, is held out; documents are apart."""
    documents = [[part[:9], part[9:]] for part in DOCUMENTS]
    path = write_megatron(tmp_path / "text_document", documents, dtype, separator)
    config = DataConfig(source=str(path), seq_len=8, holdout=0.2)
    data = open_data(config, 0)
    stream = np.fromfile(path, dtype)
    train = data.train.samples(0, data.train.num_sequences or 0)
    assert np.array_equal(train[:, :-1].ravel(), stream[: train.shape[0] * 8])
    edges = np.cumsum([0, *(len(document) + separator for document in DOCUMENTS)])
    cut = int(edges[np.searchsorted(edges, round(len(stream) * 0.8))])
    held_out = data.held_out.samples(0, 2)
    assert np.array_equal(held_out[:, :-1].ravel(), stream[cut : cut + 16])
    assert data.document_mask
    assert masks_by_default(config.source)  # `dmoe verify` follows it
    # in a stream a separator opens a document
    starts = [0, *(int(edge) - separator for edge in edges[1:] if edge < cut)]
    expected = np.zeros(train.shape[0] * 8, bool)
    expected[[start for start in starts if start < len(expected)]] = True
    position = data.train.sample_masks(0, len(train)).position_BS.ravel()
    in_row = np.arange(len(expected)) % 8 == 0
    assert np.array_equal(position == 0, expected | in_row)
    assert "which tokenizer made them cannot be checked" in data.describe()


def test_nanogpt_is_mapped(tmp_path: Path) -> None:
    path = write_nanogpt(tmp_path / "train.bin", DOCUMENTS)
    config = DataConfig(source=str(path), seq_len=8, holdout=0.25)
    data, stream = open_data(config, 0), np.fromfile(path, "<u2")
    assert np.array_equal(data.train.samples(0, 5)[:, :-1].ravel(), stream[:40])
    cut = round(len(stream) * 0.75)
    assert np.array_equal(data.held_out.samples(0, 2)[:, :-1].ravel(), stream[cut : cut + 16])
    assert not data.document_mask
    assert not masks_by_default(config.source)
    with pytest.raises(ConfigError, match=r"document_mask=True: needs the boundaries"):
        open_data(replace(config, document_mask=True), 0)
    other = write_nanogpt(tmp_path / "val.bin", DOCUMENTS[::-1])
    both = open_data(replace(config, validation_source=str(other)), 0)
    assert both.train.num_sequences == (len(stream) - 1) // 8
    assert both.held_out.samples(0, 1)[0, 0] == DOCUMENTS[-1][0]
    assert len({both.fingerprint, data.fingerprint, open_data(config, 0).fingerprint}) == 2
    # another token anywhere near a sample of the file is another fingerprint
    stream[3] += 1
    stream.tofile(path)
    assert open_data(config, 0).fingerprint != data.fingerprint


@pytest.mark.parametrize("kind", ["nanogpt", "megatron", "megatron without separators"])
def test_documents_of_tokens_are_prepared(tmp_path: Path, kind: str) -> None:
    """Split by hash, without duplicates, in order; the rest is as in the file."""
    given = [*DOCUMENTS, DOCUMENTS[3], DOCUMENTS[9]]
    if kind == "nanogpt":
        path = write_nanogpt(tmp_path / "train.bin", given)
    else:
        split = [[document[:5], document[5:]] for document in given]
        path = write_megatron(tmp_path / "text", split, separator=kind == "megatron")
    config = DataConfig(source=str(path), holdout=0.2, seq_len=8)
    sizes = {"shard_tokens": 999, "part_bytes": 500, "piece_bytes": 8}
    index = prepare_shards(config, tmp_path / "out", **sizes)
    train, held_out = (documents_of(tmp_path / "out", name) for name in SPLITS)
    assert len(held_out) > 3
    assert sorted(map(tuple, [*train, *held_out])) == sorted(map(tuple, DOCUMENTS))
    assert train == [document for document in DOCUMENTS if document not in held_out]
    assert index.notes == ("duplicate or empty documents left out (2)",)
    assert index.splits["train"].text_bytes == sum(map(len, train))
    assert open_data(replace(config, source=str(tmp_path / "out")), 0).document_mask


def test_one_stream_without_separators_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    np.arange(1, 200, dtype="<u2").tofile(path)
    prepare_shards(DataConfig(source=str(path), holdout=0.25), tmp_path / "out", part_bytes=64)
    train, held_out = (documents_of(tmp_path / "out", name) for name in SPLITS)
    assert (train, held_out) == ([[*range(1, 150)]], [[*range(150, 200)]])


def cut_off(suffix: str, count: int) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        file = path.with_suffix(suffix)
        file.write_bytes(file.read_bytes()[:-count])

    return change


def put(at: int, data: bytes) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        file = path.with_suffix(".idx")
        content = bytearray(file.read_bytes())
        content[at : at + len(data)] = data
        file.write_bytes(content)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut_off(".bin", 2), r"text.bin: has \d+ bytes, and text.idx describes \d+"),
        (cut_off(".idx", 8), r"text.idx: has \d+ bytes, and an index of 70 sequences"),
        (cut_off(".idx", 1300), "is truncated"),
        (put(0, b"XX"), "does not begin as an index of Megatron"),
        (put(9, b"\x02"), "must be of version 1, but is 2"),
        (put(17, b"\x07"), "has tokens of type 7, which are no integers"),
        (put(34, struct.pack("<i", -1)), "sequence of negative length"),
        (put(34, struct.pack("<i", 7)), "do not lie one after the other"),
        (put(34 + 12 * 70 + 8, struct.pack("<q", 99)), "boundaries that do not ascend"),
        (lambda path: path.unlink(), "text.bin is missing"),
        (lambda path: path.with_suffix(".idx").unlink(), "has 2_,_ bytes"),
    ],
)
def test_a_damaged_file_is_refused(
    tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    path = write_megatron(tmp_path / "text", [[document] for document in DOCUMENTS])
    change(path)
    source = path if path.exists() else path.with_suffix(".idx")
    if "2_,_" in message:  # without its index it is a stream of nanoGPT, of an odd size
        path.write_bytes(path.read_bytes() + b"x")
        message = r"text.bin: has \d+ bytes, and nanoGPT's tokens have 2 each"
    config = DataConfig(source=str(source), seq_len=8)
    with pytest.raises(ConfigError, match=message):
        open_data(config, 0)
    with pytest.raises(ConfigError, match=message):
        prepare_shards(config, tmp_path / "out")


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    path = write_nanogpt(tmp_path / "train.bin", [[300, *range(1, 200)]])
    config = DataConfig(source=str(path), seq_len=8)
    with pytest.raises(ConfigError, match="must hold tokens below 256, not 300"):
        open_data(config, 0).train.samples(0, 1)
    with pytest.raises(ConfigError, match=r"holds the token 300, and data\.tokenizer has 256"):
        prepare_shards(config, tmp_path / "out")
    path.write_bytes(struct.pack("<i", 20240520) + bytes(1020) + path.read_bytes())
    with pytest.raises(ConfigError, match=r"begins with the header of llm.c"):
        open_data(config, 0)
