"""Every format gives the same sequences as the same text in plain files."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data import open_data
from dmoe.data.formats import RecordFields, read_records
from dmoe.data.sources import large_note, read_corpus
from tests.data.formats import WRITERS, json_lines, parquet, plain, separated

TEXTS = st.text(
    st.one_of(
        # Of many control characters a plain file is taken for a binary one.
        st.characters(exclude_categories=["Cs", "Cc"]),
        st.sampled_from('\r\n\t",;\\{}[]\u2028\ufeffé'),
    ),
    max_size=40,
)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(WRITERS)), st.lists(TEXTS, max_size=8), st.booleans())
def test_every_format_gives_the_sequences_of_plain_files(
    name: str, drawn: list[str], many: bool
) -> None:
    """Over formats, encodings and sizes: few documents, which are cut, and many, which are not."""
    texts = [f"long text {n} " * 9 for n in range(66 if many else 3)]
    texts[1:1] = [*drawn, "one NUL \0 in a text"]
    with tempfile.TemporaryDirectory() as folder:
        sources = [plain(Path(folder), texts), WRITERS[name](Path(folder), texts)]
        data = [open_data(DataConfig(str(s), seq_len=5, holdout=0.3), 7) for s in sources]
        documents = [
            [document.content for document in read_corpus(str(s)).documents] for s in sources
        ]
    assert documents[0] == documents[1]
    assert data[0].fingerprint == data[1].fingerprint
    for step in (0, 3):
        batches = [d.train.batch(step, 0, 9, 9) for d in data]
        assert np.array_equal(*batches)


def test_saved_and_hub_datasets_are_read_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets, an extra, is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [f"text {n} é\r\n" * 9 for n in range(5)]
    reference = open_data(DataConfig(str(plain(tmp_path, texts)), seq_len=5), 0).fingerprint
    made = datasets.Dataset.from_dict({"id": list(range(5)), "text": texts})
    datasets.disable_progress_bars()
    made.save_to_disk(tmp_path / "saved", num_shards=2)
    datasets.DatasetDict(train=made, test=made).save_to_disk(tmp_path / "splits")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    (tmp_path / "hub" / "README.md").write_text("# A dataset\n")
    for split in ("train", "test"):
        made.to_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    for source in (
        tmp_path / "saved",
        tmp_path / "splits" / "train",
        f"hf:{tmp_path}/hub",
        f"hf:{tmp_path}/hub@test",
    ):
        data = open_data(DataConfig(str(source), seq_len=5), 0)
        assert data.fingerprint == reference, source
    assert data.domains == ("hub",)
    for source, message in {
        f"{tmp_path}/splits": r"is a saved dataset of several splits \(test, train\); name one",
        f"hf:{tmp_path}/hub@none": "has no split none, but test, train",
        f"hf:{tmp_path}/nowhere": "cannot be loaded",
        "hf:": "must name a dataset",
    }.items():
        with pytest.raises(ConfigError, match=message):
            read_corpus(source)
    (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ConfigError, match=r"saved: lacks data-00001-of-00002\.arrow"):
        read_corpus(str(tmp_path / "saved"))


def put(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


LINES = json_lines(["one", "two"])
BAD: dict[str, tuple[bytes | str, str]] = {
    "truncated.jsonl.gz": (gzip.compress(LINES)[:-9], "is a gzip file that ends too early; it is"),
    "damaged.txt.gz": (
        gzip.compress(bytes(99))[:-8] + bytes(8),
        r"is a damaged gzip file \(CRC check failed",
    ),
    "list.jsonl": (LINES + b"\n[1]\n", "line 4 is a list, not an object; write objects"),
    "null.jsonl": ("null\n", "line 1 is null, not an object"),
    "cut.jsonl": (LINES + b'{"text": "a', "line 3 is no JSON"),
    "field.jsonl": ('{"body": "a"}\n', "line 1 has no 'text', but 'body'; repair it, or set data."),
    "number.jsonl": ('{"text": 1}\n', "line 1 has no string in 'text' but 1;"),
    "nothing.jsonl": ('{"text": null}\n', "line 1 has no string in 'text' but null;"),
    "latin.jsonl": (b'{"text": "\xe9"}\n', "line 1 is not UTF-8 .byte 0xe9 after 10.; convert"),
    "half.jsonl": ('{"text": "\\ud800"}\n', "line 1 has half of a surrogate pair"),
    "object.json": ('[{"text": "a"}, 3]', "item 2 is a number, not an object"),
    "latin.csv": (b"text\na\n\xe9\n", "line 3 is not UTF-8"),
    "open.csv": ('text\na\n"b\nc\n', "line 3 is no row of CSV"),
    "long.csv": ("a,text\n1,2\n1,2,3\n", "line 3 has 3 values, and the header has 2"),
    "twice.csv": ("a,a\n1,2\n", "has two columns named 'a'"),
    "empty.csv": ("", "is empty: its first line must name the columns"),
    "empty.parquet": ("", "is damaged or no Parquet file"),
    "cut.parquet": (b"PAR1" + bytes(50), "is damaged or no Parquet file"),
    "cut.arrow": (b"ARROW1\0\0" + bytes(50), "is damaged or no Arrow file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_sentence_with_its_place(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    path = put(tmp_path / name, content)
    with pytest.raises(ConfigError, match=message) as refused:
        read_corpus(str(path))
    assert str(refused.value).startswith(f"data.source={path}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_every_truncation_of_a_compressed_file_is_an_error(suffix: str, tmp_path: Path) -> None:
    """zstandard's own reader gave the beginning of the text without a word."""
    compress = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": zstandard.compress,
    }[suffix]
    lines = json_lines([f"text {n * n} " * 9 for n in range(99)])
    whole, path = compress(lines), tmp_path / f"a.jsonl.{suffix}"
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=rf"^data\.source={path}: is a "):
            list(read_records(path, RecordFields()))
    path.write_bytes(whole)
    assert len(list(read_records(path, RecordFields()))) == 99


def test_which_field_is_the_text(tmp_path: Path) -> None:
    """`text`, else the only column of strings; anything else is refused with the names."""
    two = put(tmp_path / "two.csv", "title,n,body\nA,1,some text\n")
    with pytest.raises(ConfigError) as refused:
        read_corpus(str(two))
    assert str(refused.value) == (
        f"data.text_field=null: must name the text of {two}, which has 2 columns of strings and "
        "none named text; use one of title, n, body"
    )

    def read(path: Path, text: str | None, label: str | None = None) -> list[tuple[bytes, str]]:
        corpus = read_corpus(str(path), RecordFields(text, label))
        return [(document.content, document.domain) for document in corpus.documents]

    assert read(two, "body") == [(b"some text", "two")]
    assert read(two, None, "title") == [(b"some text", "A")]
    assert read(two, "body", "n") == [(b"some text", "1")]
    for text, label, message in (
        ("none", None, f"data.text_field=none: is no column of {two}; use one of title, n, body"),
        ("body", "none", f"data.label_field=none: is no column of {two}; use one of"),
        ("body", "body", "data.label_field=body: is the text"),
    ):
        with pytest.raises(ConfigError, match=message):
            read(two, text, label)
    import pyarrow as pa

    numbers = parquet(tmp_path / "a.parquet", ["1"], pa.int64())
    for text in (None, "body"):
        with pytest.raises(
            ConfigError, match=r"no column of strings and none|row 1 has no string in 'body' but 1;"
        ):
            read(numbers, text)
    lines = put(tmp_path / "a.jsonl", '{"text": "a", "by": ""}\n')
    with pytest.raises(ConfigError, match="line 1 has no label in 'by' but an empty string"):
        read(lines, None, "by")
    plain_text = put(tmp_path / "a.txt", "a")
    with pytest.raises(ConfigError, match=r"data\.text_field=body: is a field of records"):
        read(plain_text, "body")


def test_a_label_is_the_domain_of_a_document(tmp_path: Path) -> None:
    lines = [{"text": f"{n} words " * 30, "author": "AB"[n % 2]} for n in range(10)]
    path = put(tmp_path / "books.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    data = open_data(DataConfig(str(path), seq_len=8, label_field="author"), 0)
    assert data.domains == ("A", "B")
    assert "books.jsonl: 1 file, 10 documents, 0.0 MB (A 50%, B 50%); " in data.describe()
    capitals = read_corpus(f"upper:{path}", RecordFields(label="author"))
    assert {document.domain for document in capitals.documents} == {"upper-A", "upper-B"}


def test_records_are_counted_as_documents_of_their_file(tmp_path: Path) -> None:
    """A JSONL of ten books was one document, and its two halves were "2 files"."""
    path = put(
        tmp_path / "docs.jsonl", json_lines([f"book {n} " * 20 for n in range(10)] + ["", ""])
    )
    data = open_data(DataConfig(str(path), seq_len=8), 0)
    assert data.describe().startswith(
        f"{path}: 1 file, 10 documents, 0.0 MB; duplicate or empty documents left out (2); "
        "10 documents, fewer than 50: the last 5.00% of each held out; "
    )
    names = [document.name for document in read_corpus(str(path)).documents]
    assert names[:2] == ["docs/docs.jsonl:1", "docs/docs.jsonl:2"]


def test_a_file_is_read_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first document is there when a small part of the file has been read, in any format."""
    texts = [f"{n} " + random.Random(n).randbytes(500).hex() for n in range(2000)]
    for name in ("jsonl", "jsonl.gz", "jsonl.zst", "csv", "csv.gz, all quoted", "arrow stream"):
        path = WRITERS[name](tmp_path, texts)
        whole = path.read_bytes()
        damage = len(whole) * 3 // 4
        path.write_bytes(whole[:damage] + b"\xff" * (len(whole) - damage))
        records = read_records(path, RecordFields())
        assert [next(records).content.decode() for _ in range(200)] == texts[:200], name
        if name != "arrow stream":  # of which the bytes of a text are not checked
            with pytest.raises(ConfigError, match=rf"^data\.source={path}: "):
                list(records)


def test_a_value_of_csv_may_be_long(tmp_path: Path) -> None:
    """The csv module refuses more than 131,072 characters, which is less than a book."""
    import csv

    before = csv.field_size_limit()
    path = put(tmp_path / "a.csv", separated(["x" * 200_000], ","))
    assert len(read_corpus(str(path)).documents[0].content) == 200_000
    assert csv.field_size_limit() == before


def test_a_missing_library_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (("pyarrow", "a.parquet"), ("zstandard", "a.jsonl.zst"), ("datasets", "")):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        writer = {"a.parquet": "parquet", "a.jsonl.zst": "jsonl.zst"}.get(name)
        source = str(WRITERS[writer](tmp_path, ["text"])) if writer else "hf:somebody/books"
        with pytest.raises(
            ConfigError,
            match=rf"needs {module}, which is not installed; pip install 'dmoe\[data\]'$",
        ):
            read_corpus(source)


def test_large_text_is_noted_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmoe.data.sources.LARGE", 1000)
    small = put(tmp_path / "small.txt", "a" * 900)
    assert large_note(str(small)) is None
    put(tmp_path / "other.txt", "b" * 900)
    for source in (f"{tmp_path}", f"{tmp_path}/*.txt", f"{small},upper:{tmp_path}/other.txt"):
        note = large_note(source)
        assert note is not None
        assert f"dmoe data prepare {source} --out DIR" in note
    assert large_note("stdlib,hf:books,/nowhere/x") is None
