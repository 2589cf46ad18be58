"""Files that are no text, links, pipes: nothing is left out or misread without a word."""

from __future__ import annotations

import gzip
import json
import os
import re
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data import open_data, prepare_shards
from dmoe.data import sources as sources_module
from dmoe.data.shards import verify_shards
from dmoe.data.sources import read_corpus

TEXT = "The router sends each token to two experts.\n"


def written(path: Path, content: bytes | str = TEXT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", TEXT)


LINE = json.dumps({"text": TEXT}) + "\n"
OTHER_FORMATS: dict[str, tuple[str, bytes | Callable[[Path], None]]] = {
    "docs.ipynb": ("Jupyter", json.dumps({"cells": [{"source": TEXT}]}).encode()),
    "docs.docx": ("zip", zipped),
    "docs.tar.gz": ("tar", gzip.compress(bytes(257) + b"ustar" + bytes(250))),
    "docs.parquet.gz": ("compressed Parquet", gzip.compress(b"PAR1" + bytes(99))),
    "twice.txt.gz": ("twice compressed", gzip.compress(gzip.compress(TEXT.encode()))),
    "not.txt.gz": ("damaged gzip", TEXT.encode()),
    "empty.jsonl.gz": ("damaged gzip", b""),
    "paper.pdf": ("PDF", b"%PDF-1.7\n1 0 obj\n"),
    "notepad.txt": ("UTF-16", TEXT.encode("utf-16")),
    "windows.csv": ("UTF-16", "text\nhello\n".encode("utf-16")),
    "without_mark.txt": ("binary", TEXT.encode("utf-16-le")),
    "tokens.bin": ("nanoGPT tokens", bytes(range(256)) * 4),
    "tokens.idx": ("Megatron tokens", b"MMIDIDX\0\0" + bytes(99)),
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_a_named_file_of_another_format_is_refused(name: str, tmp_path: Path) -> None:
    """/bin/ls, UTF-16 from a Windows editor, PDF, and token files of other programs once trained as
    raw bytes with exit code 0."""
    kind, content = OTHER_FORMATS[name]
    path = tmp_path / name
    if callable(content):
        content(path)
    else:
        written(path, content)
    with pytest.raises(ConfigError) as refused:
        read_corpus(str(path))
    assert str(refused.value).startswith(f"data.source={path}: is a {kind} file, ")


def test_the_same_files_in_a_directory_are_left_out_and_counted(tmp_path: Path) -> None:
    """Once only binary files were counted, and a glob took every file that it matched."""
    for name, (_, content) in OTHER_FORMATS.items():
        if not callable(content):
            written(tmp_path / "d" / name, content)
    written(tmp_path / "d" / "text.txt")
    for source in (tmp_path / "d", f"{tmp_path}/d/*"):
        corpus = read_corpus(str(source))
        assert [document.content for document in corpus.documents] == [TEXT.encode()]
        (note,) = corpus.notes
        assert note.startswith(f"left out of {source}: ")
        counts = {
            kind.lstrip(": "): int(n)
            for kind, n in re.findall(r"([A-Za-z]?[\w -]+) \((\d+)\)", note)
        }
        assert sum(counts.values()) == len(OTHER_FORMATS) - 1
    with pytest.raises(ConfigError, match=r"no text file is found here .*damaged gzip files \(2\)"):
        read_corpus(f"{tmp_path}/d/*.[tj]*.gz")


@pytest.mark.parametrize("pattern", ["", "/**", "/*"])
def test_text_beside_records_is_refused(pattern: str, tmp_path: Path) -> None:
    """A README beside the records would be trained on, or half of the files would be left out."""
    written(tmp_path / "d" / "README.md")
    written(tmp_path / "d" / "books.jsonl.gz", gzip.compress(LINE.encode()))
    message = (
        r"holds files of text \(1, e\.g\. README\.md\) and of records "
        rf"\(1, e\.g\. books\.jsonl\.gz\), mixed; name one kind: {tmp_path}/d/\*\*/\*\.jsonl\.gz$"
    )
    with pytest.raises(ConfigError, match=message) as refused:
        read_corpus(f"{tmp_path}/d{pattern}")
    corpus = read_corpus(refused.value.fix.removeprefix("name one kind: "))
    assert [document.name for document in corpus.documents] == ["d/books.jsonl.gz:1"]


@pytest.mark.parametrize(
    "content",
    [b"{not json}\n{nor this}\n", b'{"one": "object"}\n', b"[1, 2]\n", b"a\0b" + b"c" * 99],
)
def test_what_only_looks_like_another_format_is_text(content: bytes, tmp_path: Path) -> None:
    for name in ("a.json", "a", "a.py"):
        assert read_corpus(str(written(tmp_path / name, content))).documents[0].content == content


def test_records_named_txt_are_meant_as_they_are(tmp_path: Path) -> None:
    """The error says so: a model of JSON Lines themselves is possible."""
    path = written(tmp_path / "docs.txt", LINE * 3)
    assert read_corpus(str(path)).documents[0].content == (LINE * 3).encode()


def test_links_are_followed_to_files_and_directories(tmp_path: Path) -> None:
    """They were skipped without a word: the files of a download cache are all links."""
    written(tmp_path / "blobs" / "0a1b", "one\n")
    written(tmp_path / "other" / "deep" / "two.txt", "two\n")
    written(tmp_path / "d" / "three.txt", "three\n")
    (tmp_path / "d" / "one.txt").symlink_to("../blobs/0a1b")
    (tmp_path / "d" / "linked").symlink_to(tmp_path / "other")
    corpus = read_corpus(str(tmp_path / "d"))
    assert [document.name for document in corpus.documents] == [
        "d/linked/deep/two.txt",
        "d/one.txt",
        "d/three.txt",
    ]
    assert corpus.notes == (f"links followed in {tmp_path / 'd'} (2)",)


def test_a_linked_directory_is_read_once_and_loops_end(tmp_path: Path) -> None:
    """A link to the parent would read the siblings of the directory that was named."""
    written(tmp_path / "sibling.txt", "not asked for\n")
    written(tmp_path / "d" / "b" / "real.txt")
    for name, target in (("a", "b"), ("c", "b"), ("up", ".."), ("self", "."), ("x", "x")):
        (tmp_path / "d" / name).symlink_to(target)
    corpus = read_corpus(str(tmp_path / "d"))
    assert [document.name for document in corpus.documents] == ["d/b/real.txt"]
    assert corpus.notes == (
        f"left out of {tmp_path / 'd'}: circular links (1), "
        "links to directories that are read already or contain them (4)",
    )


def special_files(directory: Path) -> None:
    directory.mkdir()
    os.mkfifo(directory / "pipe")
    (directory / "broken").symlink_to("nowhere.txt")
    (directory / "round").symlink_to("round")
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(directory)  # the path of a socket has a short limit
        try:
            made.bind("socket")
        finally:
            os.chdir(here)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("pipe", "pipe"), ("broken", "broken link"), ("round", "circular link"), ("socket", "socket")],
)
def test_what_is_no_plain_file_is_said_by_name(name: str, kind: str, tmp_path: Path) -> None:
    """A pipe and a broken link were "no such file"."""
    special_files(tmp_path / "d")
    with pytest.raises(ConfigError, match=rf"is a {kind}, not a file that every start"):
        read_corpus(str(tmp_path / "d" / name))
    with pytest.raises(ConfigError, match="is a character device"):
        read_corpus("/dev/null")


def test_a_tokenizer_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    """It was waited for without end."""
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"data\.tokenizer=.*and this is a pipe; name a plain"):
        open_data(DataConfig(tokenizer=str(tmp_path / "tokenizer.json")), 0)


def test_special_and_hidden_names_in_a_directory_are_counted(tmp_path: Path) -> None:
    """docs/data.md promised that hidden files are counted; only binary ones were."""
    special_files(tmp_path / "d")
    written(tmp_path / "d" / "a.txt")
    written(tmp_path / "d" / ".hidden" / "b.txt", "b")
    written(tmp_path / "d" / ".c.txt", "c")
    corpus = read_corpus(str(tmp_path / "d"))
    assert [document.name for document in corpus.documents] == ["d/a.txt"]
    assert corpus.notes == (
        f"left out of {tmp_path / 'd'}: broken links (1), circular links (1), hidden names (2), "
        "pipes (1), sockets (1)",
    )


def test_directories_that_a_glob_matches_are_counted(tmp_path: Path) -> None:
    """`data/*` over sub-directories read only the files beside them."""
    written(tmp_path / "d" / "sub" / "b.txt", "b")
    written(tmp_path / "d" / "a.txt")
    assert read_corpus(f"{tmp_path}/d/*").notes == (f"left out of {tmp_path}/d/*: directories (1)",)
    assert read_corpus(f"{tmp_path}/d/**").notes == ()
    with pytest.raises(ConfigError, match=r"no text file is found here \(.*directories \(1\)"):
        read_corpus(f"{tmp_path}/d/s*")


def test_a_directory_that_cannot_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """os.walk ignores it, so a sub-directory without permission was missing from the corpus."""
    written(tmp_path / "d" / "a.txt")
    written(tmp_path / "d" / "locked" / "b.txt", "b")
    scandir = os.scandir

    def refusing(path: Path) -> object:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("dmoe.data.files.os.scandir", refusing)
    with pytest.raises(ConfigError, match=r"must be readable, but .*locked is not \(Permission"):
        read_corpus(str(tmp_path / "d"))


def test_shards_among_other_sources_are_refused_not_read_as_text(tmp_path: Path) -> None:
    """Their index.json was the text: as data.eval_source, and as one of several entries."""
    text = written(tmp_path / "text.txt", TEXT * 99)
    shards = tmp_path / "all" / "shards"
    prepare_shards(DataConfig(source=str(text), seq_len=16), shards)
    for field, config in {
        "data.source": DataConfig(source=f"{text},{shards}", seq_len=16),
        "data.eval_source": DataConfig(source=str(text), eval_source=str(shards), seq_len=16),
    }.items():
        with pytest.raises(ConfigError, match=f"{field}={shards}: is a directory of shards, which"):
            open_data(config, 0)
    written(tmp_path / "all" / "a.txt")
    (note,) = read_corpus(str(tmp_path / "all")).notes
    assert note.endswith(": directories of shards (1)")
    with pytest.raises(ConfigError, match=r"a synthetic source can only be the whole"):
        read_corpus(f"{text},synthetic:copy")


def test_one_file_is_one_file(tmp_path: Path) -> None:
    """Its end is held out, and both halves were counted: "2 files", from shards too."""
    text = written(tmp_path / "own.txt", TEXT * 99)
    config = DataConfig(source=str(text), seq_len=16)
    assert f"{text}: 1 file, " in open_data(config, 0).describe()
    prepare_shards(config, tmp_path / "shards")
    verify_shards(tmp_path / "shards")
    from_shards = DataConfig(source=str(tmp_path / "shards"), seq_len=16, holdout=0.2)
    described = open_data(from_shards, 0).describe()
    assert "shards: 1 file, " in described
    assert "data.holdout=0.2 is not used" in described, "once without a word"


def test_shards_say_what_was_left_out_when_they_were_made(tmp_path: Path) -> None:
    """`prepare_shards` dropped the notes, so nobody ever heard of NUL bytes and skipped files."""
    for name in "abcd":
        written(tmp_path / "d" / f"{name}.txt", f"{name} {TEXT}" * 9 + "\0")
    written(tmp_path / "d" / "e.pdf", "%PDF-")
    config = DataConfig(source=str(tmp_path / "d"), seq_len=16, holdout=0.5)
    prepare_shards(config, tmp_path / "shards")
    described = open_data(DataConfig(source=str(tmp_path / "shards"), seq_len=16), 0).describe()
    assert "PDF files (1)" in described
    assert "NUL bytes removed (4)" in described


def test_text_that_is_only_evaluated_has_the_same_notes(tmp_path: Path) -> None:
    """What encoding changes was said of data.source only."""
    text = written(tmp_path / "a.txt", TEXT * 99)
    other = written(tmp_path / "b.txt", f"other {TEXT}" * 99 + "\0")
    data = open_data(DataConfig(source=str(text), eval_source=str(other), seq_len=16), 0)
    assert "evaluation only" in data.describe()
    assert "NUL bytes removed (1)" in data.describe()


def test_two_entries_with_one_name_are_one_domain_and_it_is_said(tmp_path: Path) -> None:
    """Labels, mixing and evaluation go by domain, and the names of two entries may be equal."""
    one, two = (
        written(tmp_path / "x" / "data.txt", "one"),
        written(tmp_path / "y" / "data.txt", "two"),
    )
    assert read_corpus(f"{one},{two}").notes == (f"{one} and {two} are one domain, data",)


def test_the_library_is_read_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links of the standard library depend on the distribution: they stay unread, as ever."""
    monkeypatch.setattr(
        sources_module,
        "list_directory",
        lambda root: pytest.fail("the library has a rule of its own"),
    )
    assert len(read_corpus("stdlib").documents) > 300
