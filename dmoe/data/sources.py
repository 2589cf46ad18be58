"""Sources of text: the standard library, the Debian guide, files, globs, directories, datasets.

`data.source`, `data.validation_source` and `data.eval_source` are lists of entries separated by
commas. A file of plain text is one document, and so is each record of a file of records (formats/).
The domain of a document is its label if data.label_field is set, else it is named after its entry:
`python` for the standard library, the language for the guide, else the last part of the entry
before any wildcard (`texts/de/**/*.txt` gives `de`, `a/kjv.txt` gives `kjv`, `hf:user/books` gives
`books`). A transformation is prefixed (`upper:a/kjv.txt` gives `upper-kjv`).
"""

from __future__ import annotations

import glob
import importlib.util
import logging
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from dmoe.config.errors import ConfigError
from dmoe.data.corpus import (
    Corpus,
    Document,
    split_transform,
    transform_document,
    unique_documents,
)
from dmoe.data.debian_guide import read_guide
from dmoe.data.files import (
    Listing,
    formats_of,
    holds_shards,
    list_directory,
    list_glob,
    literal_root,
    special_kind,
    walk,
)
from dmoe.data.formats import Format, RecordFields, format_of, read_records
from dmoe.data.formats.compression import inner_name
from dmoe.data.formats.hub import parse_name
from dmoe.data.formats.rows import HUB

LARGE = 200_000_000
"""Bytes of raw text from which on preparing it once is worth it."""
_FIELDS = RecordFields()
_log = logging.getLogger(__name__)
_ALLOWED = (
    "must be stdlib, guide:LANG, files of text or records, globs or directories separated by "
    "commas, hf:NAME (upper: before one gives capitals), a directory of shards, or synthetic:KIND"
)
# Tests are long, repetitive tables; packages depend on what is installed.
_EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)


def read_corpus(source: str, fields: RecordFields = _FIELDS) -> Corpus:
    """Read all documents of `source`, without duplicates, ordered by entry and then by path.

    The notes count what is left out. `fields.origin` is the config field that names the source.
    Raises ConfigError: see `Documents`; and on that field, for nothing found or only empty files.
    """
    found = Documents(source, fields)
    unique, removed = unique_documents(found)
    notes = list(found.notes)
    if removed:
        of = "files" if not found.has_records else "documents"
        notes.append(f"duplicate or empty {of} left out ({removed})")
    if not unique:
        allowed = f"{_ALLOWED}, and hold at least one byte of text"
        raise ConfigError(fields.origin, source or "''", allowed, "name a text")
    return Corpus(unique, tuple(notes))


class Documents:
    """All documents of a source, duplicates and empty ones too, one after the other.

    Iterate once: one document is held at a time (of the guide: one language). Afterwards `notes`
    says what was left out, and `has_records` whether a file of records was read.

    Args:
        source: entries separated by commas.
        fields: the fields of records, and the config field that names the source.

    Raises:
        ConfigError: while it is iterated: a missing or unreadable file, a format that is neither
            text nor records, a damaged file or record with its line; data.text_field or
            data.label_field for a source without records.
    """

    def __init__(self, source: str, fields: RecordFields) -> None:
        self.notes: list[str] = []
        self.has_records = False
        self._source, self._fields = source, fields

    def __iter__(self) -> Iterator[Document]:
        first_entry: dict[str, str] = {}
        for entry in entries(self._source):
            told = set[str]()
            for document in self._entry(entry):
                domain = document.domain
                if (first := first_entry.setdefault(domain, entry)) != entry and domain not in told:
                    told.add(domain)
                    if self._fields.label is None:
                        self.notes.append(f"{first} and {entry} are one domain, {domain}")
                yield document
        if self._fields.alone and not self.has_records:
            self._check_fields()

    def _check_fields(self) -> None:
        given = {"data.text_field": self._fields.text, "data.label_field": self._fields.label}
        for field, name in given.items():
            if name is not None:
                allowed = f"is a field of records, and {self._source} is plain text"
                raise ConfigError(field, name, allowed, "leave it out, or name JSON Lines or CSV")

    def _entry(self, entry: str) -> Iterator[Document]:
        transform, rest = split_transform(entry)
        if transform is not None:
            if not rest:
                raise self._error(
                    entry,
                    f"{_ALLOWED}, and {transform}: needs one of them behind it",
                    f"use {transform}:stdlib",
                )
            for document in self._entry(rest):
                yield transform_document(transform, document)
        elif entry.startswith("guide:"):
            yield from read_guide(entry.removeprefix("guide:"), self._fields.origin)
        elif entry.startswith(HUB):
            domain = Path(parse_name(entry)[0]).name
            yield from self._records(entry, None, f"{domain}/{entry}", domain)
        elif entry == "stdlib":
            yield from self._library()
        else:
            yield from self._files(entry)

    def _library(self) -> Iterator[Document]:
        """Read Python's standard library, or torch's Python files if the library is zipped."""
        root, paths, note = _library_files(self._fields.origin)
        if note:
            self.notes.append(note)
        for path in paths:
            name = f"python/{path.relative_to(root).as_posix()}"
            yield Document(self._bytes(path), name, "python")

    def _files(self, entry: str) -> Iterator[Document]:
        """Read a file, a directory or a glob; what is left out of the last two is noted."""
        path = Path(entry).expanduser()
        kind = special_kind(path)
        if kind == "directory":
            if holds_shards(path):
                raise self._error(
                    entry,
                    "is a directory of shards, which can only be the whole of data.source",
                    "name it alone, or name the text that they were made from",
                )
            if (format := format_of(path, self._fields.origin)).kind == "records":
                yield from self._records(path, format, f"{path.name}/{path.name}", path.name)
                return
            yield from self._listing(path, path, lambda: list_directory(path))
        elif kind is not None:
            raise self._error(
                entry,
                f"is a {kind}, not a file that every start and every rank could read",
                "check the link" if "link" in kind else "write its content to a file",
            )
        elif path.is_file():
            yield from self._named(path)
        elif glob.has_magic(entry):
            yield from self._listing(path, literal_root(path), lambda: list_glob(path))
        else:
            missing = "and there is no such file"
            if entry.startswith("synthetic:"):
                missing = "and a synthetic source can only be the whole of data.source"
            raise self._error(entry, f"{_ALLOWED}, {missing}", "check the path")

    def _named(self, path: Path) -> Iterator[Document]:
        format = format_of(path, self._fields.origin)
        if format.kind in ("text", "records"):
            stem = inner_name(path, format.compression).stem
            yield from self._records(path, format, f"{stem}/{path.name}", stem)
            return
        allowed = (
            f"is a {format.name} file, and its raw bytes would be trained on as if they were text"
        )
        raise self._error(path, allowed, format.fix or "name text, or records with text")

    def _listing(self, entry: Path, root: Path, find: Callable[[], Listing]) -> Iterator[Document]:
        """Read the files that `find` returns, named by their path below `root`."""
        try:
            listing = find()
        except OSError as error:
            raise self._unreadable(error.filename or entry, error) from error
        found = formats_of(listing, entry, self._fields.origin)
        notes = listing.notes(entry)
        if not found:
            left_out = f" ({notes[0]})" if listing.left_out else ""
            raise self._error(
                entry, f"{_ALLOWED}, and no text file is found here{left_out}", "check it with ls"
            )
        self.notes += notes
        domain = root.resolve().name
        for path, format in found:
            name = f"{domain}/{path.relative_to(root).as_posix()}"
            yield from self._records(path, format, name, domain)

    def _records(
        self, path: Path | str, format: Format | None, name: str, domain: str
    ) -> Iterator[Document]:
        """Read one file; a record is named by its number in the file."""
        is_text = format is not None and format.kind == "text"
        self.has_records |= not is_text
        for number, record in enumerate(read_records(path, self._fields, format), 1):
            label = domain if record.label is None else record.label
            if is_text:
                yield Document(record.content, name, label)
            else:
                yield Document(record.content, f"{name}:{number}", label, file=name)

    def _bytes(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise self._unreadable(path, error) from error

    def _error(self, value: object, allowed: str, fix: str) -> ConfigError:
        return ConfigError(self._fields.origin, value, allowed, fix)

    def _unreadable(self, path: object, error: OSError) -> ConfigError:
        allowed = f"must be readable, but {path} is not ({error.strerror})"
        return self._error(self._source, allowed, "check the file")


def entries(source: str) -> list[str]:
    """Split a source at its commas."""
    return [entry for entry in map(str.strip, source.split(",")) if entry]


def raw_bytes(source: str) -> int:
    """Count the bytes of the files that a source names, without reading one; 0 if there are none.

    What cannot be listed counts nothing: reading it says why.
    """
    total = 0
    for entry in entries(source):
        path = Path(split_transform(entry)[1]).expanduser()
        try:
            if path.is_dir():
                paths = [] if holds_shards(path) else list_directory(path).paths
            else:
                paths = list_glob(path).paths if glob.has_magic(entry) else [path]
            total += sum(file.stat().st_size for file in paths if file.is_file())
        except OSError:
            continue
    return total


def large_note(source: str) -> str | None:
    """Return what to do about a source of more than `LARGE` bytes; None for a smaller one."""
    size = raw_bytes(source)
    if size <= LARGE:
        return None
    return (
        f"data.source={source} is {size / 1e6:,.0f} MB of raw text, which every start and every "
        "rank reads and tokenizes in memory; prepare it once: "
        f"dmoe data prepare {source} --out DIR, then data.source=DIR"
    )


def _library_files(origin: str) -> tuple[Path, list[Path], str]:
    """Return the root and the files of the standard library, and a note if they are torch's."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = list(walk(root, _is_library_file, _is_library_directory))
    if paths:
        return root, paths, ""
    # find_spec of a top-level name locates the package without importing it.
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        allowed = f"found no .py file of the standard library in {root}, nor torch's"
        raise ConfigError(origin, "stdlib", allowed, "name a text file")
    note = f"no standard library source in {root}: torch's own source is used instead"
    _log.warning("%s=stdlib: %s", origin, note)
    root = Path(spec.submodule_search_locations[0])
    return root, list(walk(root, _is_library_file, _is_library_directory)), note


def _is_library_directory(name: str) -> bool:
    # config-3.11-x86_64-linux-gnu and the like describe the machine this Python was built on.
    return name not in _EXCLUDED_FOLDERS and not name.startswith((".", "config-"))


def _is_library_file(name: str) -> bool:
    return (
        name.endswith(".py")
        and not name.startswith("_sysconfigdata")
        and name not in ("sitecustomize.py", "usercustomize.py")
    )
