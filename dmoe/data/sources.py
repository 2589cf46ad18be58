"""Where documents come from: Python's own library, the installation guide, text files, globs, directories.

`data.source` and `data.eval_source` hold entries separated by commas. The domain of a document is the entry it came from, by name:
`python` for the standard library, the language for the guide, else the last part of the entry before any wildcard (`texts/de/**/*.txt`
gives `de`, `a/kjv.txt` gives `kjv`); a transformation stands before it (`upper:a/kjv.txt` gives `upper-kjv`).
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import logging
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.data.corpus import Corpus, Document, split_transform, transformed, unique_documents
from dmoe.data.debian_guide import read_guide
from dmoe.data.packing import Runs, domain_runs, token_chunks
from dmoe.data.tokenizers import Tokenizer

_log = logging.getLogger(__name__)
_ALLOWED = (
    "must be stdlib, guide:LANG, text files, globs or directories separated by commas (upper: before one gives capitals), "
    "a directory of shards, or synthetic:KIND"
)
# Tests are left out because they are long, repetitive tables; packages because they depend on what is installed.
_NOT_LIBRARY = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
_BINARY_PROBE = 8192


@dataclasses.dataclass(frozen=True)
class _Given:
    """The field that is read, for errors, and the notes it leads to."""

    field: str
    value: str
    notes: list[str] = dataclasses.field(default_factory=list)

    def refused(self, value: object, allowed: str, fix: str) -> ConfigError:
        return ConfigError(self.field, value, allowed, fix)


def read_corpus(source: str, field: str = "data.source") -> Corpus:
    """All documents of `data.source`, duplicates removed, in the order of the entries and of the paths within an entry.

    Contents are raw bytes. A file that an entry names, or a glob matches, is always taken; of a directory, hidden files and
    binary ones (a NUL in the first 8 KiB) are left out and counted in the notes. Raises ConfigError on `field`: nothing
    found, a missing or unreadable file, only empty files.
    """
    given = _Given(field, source)
    documents = [
        document
        for entry in source.split(",")
        if entry.strip()
        for document in _read_entry(given, entry.strip())
    ]
    unique, removed = unique_documents(documents)
    if removed:
        given.notes.append(f"{removed} duplicate or empty files left out")
    if not unique:
        raise given.refused(
            source or "''", f"{_ALLOWED}, and hold at least one byte of text", "name a text"
        )
    return Corpus(unique, tuple(given.notes))


def _read_entry(given: _Given, entry: str) -> list[Document]:
    transform, rest = split_transform(entry)
    if transform is not None:
        if not rest:
            raise given.refused(
                entry,
                f"{_ALLOWED}, and {transform}: needs one of them behind it",
                f"use {transform}:stdlib",
            )
        return transformed(transform, _read_entry(given, rest))
    if entry.startswith("guide:"):
        return read_guide(entry.removeprefix("guide:"), given.field)
    return _read_library(given) if entry == "stdlib" else _read_files(given, entry)


def _read_library(given: _Given) -> list[Document]:
    """Python's standard library; torch's Python files where the library is zipped."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = list(_walk(root, _is_library_file, _is_library_directory))
    if not paths:
        # find_spec of a top-level name locates the package without importing it.
        spec = importlib.util.find_spec("torch")
        if spec is None or not spec.submodule_search_locations:
            raise given.refused(
                given.value,
                f"found no .py file of the standard library in {root}, nor torch's",
                "name a text file",
            )
        root = Path(spec.submodule_search_locations[0])
        given.notes.append(
            f"no standard library source in {sysconfig.get_paths()['stdlib']}: torch's own source is used instead"
        )
        _log.warning("%s=stdlib: %s", given.field, given.notes[-1])
        paths = list(_walk(root, _is_library_file, _is_library_directory))
    return [
        _read(given, path, f"python/{path.relative_to(root).as_posix()}", "python")
        for path in paths
    ]


def _is_library_directory(name: str) -> bool:
    # config-3.11-x86_64-linux-gnu and the like describe the machine this Python was built on.
    return name not in _NOT_LIBRARY and not name.startswith((".", "config-"))


def _is_library_file(name: str) -> bool:
    return (
        name.endswith(".py")
        and not name.startswith("_sysconfigdata")
        and name not in ("sitecustomize.py", "usercustomize.py")
    )


def _read_files(given: _Given, entry: str) -> list[Document]:
    path = Path(entry).expanduser()
    if path.is_dir():
        return _read_directory(given, path)
    if path.is_file():
        return [_read(given, path, f"{path.stem}/{path.name}", path.stem)]
    if not glob.has_magic(entry):
        raise given.refused(entry, f"{_ALLOWED}, and there is no such file", "check the path")
    root = _literal_root(path)
    matches = sorted(
        (Path(match) for match in glob.glob(str(path), recursive=True)),
        key=lambda match: match.parts,
    )
    files = [match for match in matches if match.is_file()]
    if not files:
        raise given.refused(
            entry, f"{_ALLOWED}, and no file matches this glob", "check it with ls, and quote it"
        )
    domain = root.resolve().name
    return [
        _read(given, match, f"{domain}/{match.relative_to(root).as_posix()}", domain)
        for match in files
    ]


def _read_directory(given: _Given, root: Path) -> list[Document]:
    domain = root.resolve().name
    documents = [
        _read(given, path, f"{domain}/{path.relative_to(root).as_posix()}", domain)
        for path in _walk(root, _is_visible, _is_visible)
    ]
    text = [document for document in documents if b"\0" not in document.content[:_BINARY_PROBE]]
    if len(text) < len(documents):
        given.notes.append(f"{len(documents) - len(text)} binary files of {root} left out")
    if not text:
        raise given.refused(
            root, f"{_ALLOWED}, and this directory holds no text file", "check the path"
        )
    return text


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__pycache__"


def _literal_root(path: Path) -> Path:
    """The part of a glob before its first wildcard."""
    root = Path(path.anchor)
    for part in path.parts[len(root.parts) : -1]:
        if glob.has_magic(part):
            break
        root /= part
    return root


def _walk(
    root: Path, wanted: Callable[[str], bool], entered: Callable[[str], bool]
) -> Iterator[Path]:
    """Regular files below root with a wanted name, ordered by their path's parts; links are not followed."""
    found = []
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if entered(name)]
        found += [Path(directory, name) for name in files if wanted(name)]
    yield from sorted(
        (path for path in found if path.is_file() and not path.is_symlink()),
        key=lambda path: path.parts,
    )


def _read(given: _Given, path: Path, name: str, domain: str) -> Document:
    try:
        return Document(path.read_bytes(), name, domain)
    except OSError as error:
        raise given.refused(
            given.value, f"must be readable, but {path} is not ({error.strerror})", "check the file"
        ) from error


@dataclass(frozen=True)
class Evaluated:
    """The token stream of these documents, without the separator that opens it; empty if there are none."""

    part: np.ndarray
    runs: Runs
    domains: tuple[str, ...]
    """All that labels number, the training's first."""
    eval_only: tuple[str, ...]
    notes: tuple[str, ...]

    def after(self, parts: Sequence[np.ndarray], runs: Runs) -> tuple[list[np.ndarray], Runs]:
        """A held-out stream and its runs, with this behind it."""
        if not len(self.part):
            return list(parts), runs
        # The last separator of the stream before is the one that opens this one.
        opening = sum(len(part) for part in parts) - 1
        return [*parts, self.part], (
            *runs,
            *((opening + begin, label) for begin, label in self.runs),
        )


def read_evaluated(
    source: str | None,
    trained: Sequence[Document],
    held_out: Sequence[Document],
    tokenizer: Tokenizer,
    domains: tuple[str, ...],
) -> Evaluated:
    """Read `data.eval_source`. `trained` and `held_out` are the documents of data.source, `domains` theirs, in order.

    Raises ConfigError on data.eval_source: what read_corpus refuses, or nothing that may be evaluated and was not already.
    """
    if source is None:
        return Evaluated(np.zeros(0, dtype=np.int64), (), domains, (), ())
    corpus = read_corpus(source, "data.eval_source")
    keys, contents = (
        {document.key for document in trained},
        {document.content for document in held_out},
    )
    documents = [
        document
        for document in corpus.documents
        if document.key not in keys and document.content not in contents
    ]
    if not documents:
        raise ConfigError(
            "data.eval_source",
            source,
            "must hold text that data.source has not, nor the like of it",
            "name other text, or leave it out",
        )
    names = [document.domain for document in documents]
    eval_only = tuple(sorted({*names} - {*domains}))
    chunks = list(token_chunks((document.content for document in documents), tokenizer))[1:]
    runs = domain_runs([len(chunk) for chunk in chunks], names, (*domains, *eval_only))
    size = sum(len(document.content) for document in documents) / 1e6
    notes = [f"only evaluated: {source}, {len(documents)} files, {size:.2f} MB", *corpus.notes]
    if left := len(corpus.documents) - len(documents):
        notes.append(
            f"{left} of its files left out, since data.source has them or the like of them"
        )
    return Evaluated(np.concatenate(chunks), runs, (*domains, *eval_only), eval_only, tuple(notes))
