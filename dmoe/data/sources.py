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
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.data.corpus import (
    Corpus,
    Document,
    apply_transform,
    count_files,
    split_transform,
    unique_documents,
)
from dmoe.data.debian_guide import read_guide
from dmoe.data.files import (
    PROBE_BYTES,
    Listing,
    holds_shards,
    keep_text,
    list_directory,
    list_glob,
    literal_root,
    other_format,
    special_kind,
    walk,
)
from dmoe.data.packing import DomainRuns, domain_runs, token_chunks
from dmoe.data.tokenizers import Tokenizer, encoding_notes

_log = logging.getLogger(__name__)
_ALLOWED = (
    "must be stdlib, guide:LANG, text files, globs or directories separated by commas "
    "(upper: before one gives capitals), a directory of shards, or synthetic:KIND"
)
# Tests are long, repetitive tables; packages depend on what is installed.
_EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)


@dataclasses.dataclass(frozen=True)
class _SourceField:
    """The config field that is read, for error messages, and notes for the user."""

    field: str
    value: str
    notes: list[str] = dataclasses.field(default_factory=list)

    def error(self, value: object, allowed: str, fix: str) -> ConfigError:
        return ConfigError(self.field, value, allowed, fix)

    def unreadable(self, path: object, error: OSError) -> ConfigError:
        allowed = f"must be readable, but {path} is not ({error.strerror})"
        return self.error(self.value, allowed, "check the file")


def read_corpus(source: str, field: str = "data.source") -> Corpus:
    """Read all documents of `source`, without duplicates, ordered by entry and then by path.

    Contents are raw bytes. The notes count what is left out (files.py). Raises ConfigError on
    `field`: nothing found, a missing or unreadable file, a named file that is no plain text, only
    empty files.
    """
    origin, documents = _SourceField(field, source), list[Document]()
    first_entry: dict[str, str] = {}
    for entry in filter(None, map(str.strip, source.split(","))):
        found = _read_entry(origin, entry)
        for domain in sorted({document.domain for document in found}):
            if (first := first_entry.setdefault(domain, entry)) != entry:
                origin.notes.append(f"{first} and {entry} are one domain, {domain}")
        documents += found
    unique, removed = unique_documents(documents)
    if removed:
        origin.notes.append(f"duplicate or empty files left out ({removed})")
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
    paths = list(walk(root, _is_library_file, _is_library_directory))
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
        paths = list(walk(root, _is_library_file, _is_library_directory))
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
    """Read a file, a directory or a glob; what is left out of the last two is noted."""
    path = Path(entry).expanduser()
    kind = special_kind(path)
    if kind == "directory":
        if holds_shards(path):
            raise origin.error(
                entry,
                "is a directory of shards, which can only be the whole of data.source",
                "name it alone, or name the text that they were made from",
            )
        return _read_listing(origin, path, path, lambda: list_directory(path))
    if kind is not None:
        raise origin.error(
            entry,
            f"is a {kind}, not a file that every start and every rank could read",
            "check the link" if "link" in kind else "write its content to a file",
        )
    if path.is_file():
        return [_read_named(origin, path)]
    if not glob.has_magic(entry):
        missing = "and there is no such file"
        if entry.startswith("synthetic:"):
            missing = "and a synthetic source can only be the whole of data.source"
        raise origin.error(entry, f"{_ALLOWED}, {missing}", "check the path")
    return _read_listing(origin, path, literal_root(path), lambda: list_glob(path))


def _read_named(origin: _SourceField, path: Path) -> Document:
    document = _read(origin, path, f"{path.stem}/{path.name}", path.stem)
    if found := other_format(path, document.content[:PROBE_BYTES]):
        allowed = (
            f"is a {found[0]} file, and its raw bytes would be trained on as if they were text"
        )
        raise origin.error(path, allowed, found[1])
    return document


def _read_listing(
    origin: _SourceField, entry: Path, root: Path, find: Callable[[], Listing]
) -> list[Document]:
    """Read the text files that `find` returns, named by their path below `root`."""
    try:
        listing = find()
        keep_text(listing)
    except OSError as error:
        raise origin.unreadable(error.filename or entry, error) from error
    notes = listing.notes(entry)
    if not listing.paths:
        found = f" ({notes[0]})" if listing.left_out else ""
        raise origin.error(
            entry, f"{_ALLOWED}, and no text file is found here{found}", "check it with ls"
        )
    origin.notes.extend(notes)
    domain = root.resolve().name
    return [
        _read(origin, path, f"{domain}/{path.relative_to(root).as_posix()}", domain)
        for path in listing.paths
    ]


def _read(origin: _SourceField, path: Path, name: str, domain: str) -> Document:
    try:
        return Document(path.read_bytes(), name, domain)
    except OSError as error:
        raise origin.unreadable(path, error) from error


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
    notes = [
        f"evaluation only: {source}, {count_files(len(documents))}, {size:.2f} MB",
        *corpus.notes,
        *encoding_notes((document.content for document in documents), tokenizer),
    ]
    if excluded := len(corpus.documents) - len(documents):
        notes.append(f"files that data.source has, or a version of them, left out ({excluded})")
    token_N = np.concatenate(chunks)
    return EvalOnlyText(token_N, runs, (*domains, *eval_only), eval_only, tuple(notes))
