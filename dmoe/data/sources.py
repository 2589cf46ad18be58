"""Sources of text: the standard library, the Debian guide, text files, globs, directories.

`data.source` and `data.eval_source` are lists of entries separated by commas. The domain of a
document is named after its entry: `python` for the standard library, the language for the guide,
else the last part of the entry before any wildcard (`texts/de/**/*.txt` gives `de`, `a/kjv.txt`
gives `kjv`). A transformation is prefixed (`upper:a/kjv.txt` gives `upper-kjv`).

`data.eval_source` names documents that are only evaluated: a language without a module, or two
transformations at once. Documents that are in data.source, or share a group key with one that is
trained on (corpus.py), are left out. A domain that training has too keeps its label and gets more
held-out text; labels of other domains come after those of training, which do not change.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import logging
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.data.corpus import Corpus, Document, apply_transform, split_transform, unique_documents
from dmoe.data.debian_guide import read_guide
from dmoe.data.packing import DomainRuns, domain_runs, token_chunks
from dmoe.data.tokenizers import Tokenizer

_log = logging.getLogger(__name__)
_ALLOWED = (
    "must be stdlib, guide:LANG, text files, globs or directories separated by commas "
    "(upper: before one gives capitals), a directory of shards, or synthetic:KIND"
)
# Tests are long, repetitive tables; packages depend on what is installed.
_EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
_BINARY_PROBE_BYTES = 8192


@dataclasses.dataclass(frozen=True)
class _SourceField:
    """The config field that is read, for error messages, and notes for the user."""

    field: str
    value: str
    notes: list[str] = dataclasses.field(default_factory=list)

    def error(self, value: object, allowed: str, fix: str) -> ConfigError:
        return ConfigError(self.field, value, allowed, fix)


def read_corpus(source: str, field: str = "data.source") -> Corpus:
    """Read all documents of `source`, without duplicates, ordered by entry and then by path.

    Contents are raw bytes. A file that an entry names, or a glob matches, is always read. From a
    directory, hidden files are left out, and so are binary ones (a NUL in the first 8 KiB), which
    the notes count. Raises ConfigError on `field`: nothing found, a missing or unreadable file,
    only empty files.
    """
    origin = _SourceField(field, source)
    documents = [
        document
        for entry in source.split(",")
        if entry.strip()
        for document in _read_entry(origin, entry.strip())
    ]
    unique, removed = unique_documents(documents)
    if removed:
        origin.notes.append(f"{removed} duplicate or empty files left out")
    if not unique:
        raise origin.error(
            source or "''", f"{_ALLOWED}, and hold at least one byte of text", "name a text"
        )
    return Corpus(unique, tuple(origin.notes))


def _read_entry(origin: _SourceField, entry: str) -> list[Document]:
    transform, rest = split_transform(entry)
    if transform is not None:
        if not rest:
            raise origin.error(
                entry,
                f"{_ALLOWED}, and {transform}: needs one of them behind it",
                f"use {transform}:stdlib",
            )
        return apply_transform(transform, _read_entry(origin, rest))
    if entry.startswith("guide:"):
        return read_guide(entry.removeprefix("guide:"), origin.field)
    return _read_library(origin) if entry == "stdlib" else _read_files(origin, entry)


def _read_library(origin: _SourceField) -> list[Document]:
    """Read Python's standard library, or torch's Python files if the library is zipped."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = list(_walk(root, _is_library_file, _is_library_directory))
    if not paths:
        # find_spec of a top-level name locates the package without importing it.
        spec = importlib.util.find_spec("torch")
        if spec is None or not spec.submodule_search_locations:
            raise origin.error(
                origin.value,
                f"found no .py file of the standard library in {root}, nor torch's",
                "name a text file",
            )
        root = Path(spec.submodule_search_locations[0])
        origin.notes.append(
            f"no standard library source in {sysconfig.get_paths()['stdlib']}: "
            "torch's own source is used instead"
        )
        _log.warning("%s=stdlib: %s", origin.field, origin.notes[-1])
        paths = list(_walk(root, _is_library_file, _is_library_directory))
    return [
        _read(origin, path, f"python/{path.relative_to(root).as_posix()}", "python")
        for path in paths
    ]


def _is_library_directory(name: str) -> bool:
    # config-3.11-x86_64-linux-gnu and the like describe the machine this Python was built on.
    return name not in _EXCLUDED_FOLDERS and not name.startswith((".", "config-"))


def _is_library_file(name: str) -> bool:
    return (
        name.endswith(".py")
        and not name.startswith("_sysconfigdata")
        and name not in ("sitecustomize.py", "usercustomize.py")
    )


def _read_files(origin: _SourceField, entry: str) -> list[Document]:
    path = Path(entry).expanduser()
    if path.is_dir():
        return _read_directory(origin, path)
    if path.is_file():
        return [_read(origin, path, f"{path.stem}/{path.name}", path.stem)]
    if not glob.has_magic(entry):
        raise origin.error(entry, f"{_ALLOWED}, and there is no such file", "check the path")
    root = _literal_root(path)
    matches = sorted(
        (Path(match) for match in glob.glob(str(path), recursive=True)),
        key=lambda match: match.parts,
    )
    files = [match for match in matches if match.is_file()]
    if not files:
        raise origin.error(
            entry, f"{_ALLOWED}, and no file matches this glob", "check it with ls, and quote it"
        )
    domain = root.resolve().name
    return [
        _read(origin, match, f"{domain}/{match.relative_to(root).as_posix()}", domain)
        for match in files
    ]


def _read_directory(origin: _SourceField, root: Path) -> list[Document]:
    domain = root.resolve().name
    documents = [
        _read(origin, path, f"{domain}/{path.relative_to(root).as_posix()}", domain)
        for path in _walk(root, _is_visible, _is_visible)
    ]
    text = [
        document for document in documents if b"\0" not in document.content[:_BINARY_PROBE_BYTES]
    ]
    if len(text) < len(documents):
        origin.notes.append(f"{len(documents) - len(text)} binary files of {root} left out")
    if not text:
        raise origin.error(
            root, f"{_ALLOWED}, and this directory holds no text file", "check the path"
        )
    return text


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__pycache__"


def _literal_root(path: Path) -> Path:
    """Return the part of a glob before its first wildcard."""
    root = Path(path.anchor)
    for part in path.parts[len(root.parts) : -1]:
        if glob.has_magic(part):
            break
        root /= part
    return root


def _walk(
    root: Path, takes_file: Callable[[str], bool], enters_directory: Callable[[str], bool]
) -> Iterator[Path]:
    """Yield regular files below `root` by name, ordered by path parts; links are not followed."""
    found = []
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if enters_directory(name)]
        found += [Path(directory, name) for name in files if takes_file(name)]
    yield from sorted(
        (path for path in found if path.is_file() and not path.is_symlink()),
        key=lambda path: path.parts,
    )


def _read(origin: _SourceField, path: Path, name: str, domain: str) -> Document:
    try:
        return Document(path.read_bytes(), name, domain)
    except OSError as error:
        raise origin.error(
            origin.value,
            f"must be readable, but {path} is not ({error.strerror})",
            "check the file",
        ) from error


@dataclasses.dataclass(frozen=True)
class EvalOnlyText:
    """Token stream of the documents that are only evaluated; empty if there are none."""

    token_N: np.ndarray
    """Without the separator that opens a stream."""
    runs: DomainRuns
    domains: tuple[str, ...]
    """All domains by label; those of training come first."""
    eval_only: tuple[str, ...]
    """The domains that training does not have."""
    notes: tuple[str, ...]

    def append_to(
        self, arrays: Sequence[np.ndarray], runs: DomainRuns
    ) -> tuple[list[np.ndarray], DomainRuns]:
        """Append this token stream and its runs to those of a held-out split."""
        if not len(self.token_N):
            return list(arrays), runs
        # The last separator of the stream so far opens this one, so positions count from there.
        offset = sum(len(array) for array in arrays) - 1
        shifted = tuple((offset + start, label) for start, label in self.runs)
        return [*arrays, self.token_N], (*runs, *shifted)


def read_eval_only(
    source: str | None,
    train: Sequence[Document],
    held_out: Sequence[Document],
    tokenizer: Tokenizer,
    domains: tuple[str, ...],
) -> EvalOnlyText:
    """Read and tokenize `data.eval_source`.

    Args:
        source: data.eval_source; None gives no text.
        train: training documents of data.source.
        held_out: held-out documents of data.source.
        tokenizer: of the run.
        domains: domains of data.source, by label.

    Raises:
        ConfigError: on data.eval_source: what `read_corpus` refuses, or no document is left.
    """
    if source is None:
        return EvalOnlyText(np.zeros(0, dtype=np.int64), (), domains, (), ())
    corpus = read_corpus(source, "data.eval_source")
    train_keys = {document.split_key for document in train}
    held_out_contents = {document.content for document in held_out}
    documents = [
        document
        for document in corpus.documents
        if document.split_key not in train_keys and document.content not in held_out_contents
    ]
    if not documents:
        raise ConfigError(
            "data.eval_source",
            source,
            "must hold text that is not in data.source, nor a translation or transform of it",
            "name other text, or leave it out",
        )
    names = [document.domain for document in documents]
    eval_only = tuple(sorted({*names} - {*domains}))
    chunks = list(token_chunks((document.content for document in documents), tokenizer))[1:]
    runs = domain_runs([len(chunk) for chunk in chunks], names, (*domains, *eval_only))
    size = sum(len(document.content) for document in documents) / 1e6
    notes = [f"evaluation only: {source}, {len(documents)} files, {size:.2f} MB", *corpus.notes]
    if excluded := len(corpus.documents) - len(documents):
        notes.append(f"{excluded} of its files left out: data.source has them or a version of them")
    token_N = np.concatenate(chunks)
    return EvalOnlyText(token_N, runs, (*domains, *eval_only), eval_only, tuple(notes))
