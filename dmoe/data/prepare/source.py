"""The documents of `data.source`, one after the other, as often as they are asked for.

A large file of plain text is not read whole, but described (`FileContent`); each record of a file
of records is held on its own. A file of tokens gives the documents between its separators, or those
that its index names.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dmoe.config.errors import ConfigError
from dmoe.config.plugins import label, parse
from dmoe.config.schema import DataConfig
from dmoe.data.corpus import Document, own_documents
from dmoe.data.files import list_directory, list_glob
from dmoe.data.formats import Format, RecordFields
from dmoe.data.packing import token_dtype
from dmoe.data.prepare.documents import (
    SMALL,
    Content,
    FileContent,
    MemoryContent,
    SourceDocument,
    TokenContent,
)
from dmoe.data.shard_index import is_shard_directory, refuse_unfinished
from dmoe.data.sources import Documents
from dmoe.data.splits import record_fields
from dmoe.data.token_files import TokenFile, is_token_file, open_token_file
from dmoe.data.tokenizers import Tokenizer

_PACKED = {".gz", ".bz2", ".xz", ".zst", ".parquet", ".pq", ".arrow", ".feather"}
"""Suffixes of files whose size is not that of their text."""


class _LargeFile(Document):
    """A file of plain text that is read only where it is used."""

    def __init__(self, path: Path, found: os.stat_result, name: str, domain: str) -> None:
        for key, value in (("name", name), ("domain", domain), ("path", path), ("found", found)):
            object.__setattr__(self, key, value)

    path: Path
    found: os.stat_result

    @property
    def content(self) -> bytes:
        """All of it, for what cannot be done in pieces (`upper:`)."""
        return self.path.read_bytes()


class _Documents(Documents):
    """Documents whose large files of text are described."""

    def _records(
        self, path: Path | str, format: Format | None, name: str, domain: str
    ) -> Iterator[Document]:
        if format is not None and format.kind == "text" and format.compression is None:
            found = Path(path).stat()
            if found.st_size > SMALL:
                yield _LargeFile(Path(path), found, name, domain)
                return
        yield from super()._records(path, format, name, domain)


class Source:
    """All documents of `data.source` and `data.validation_source`."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        """Refuse sources that cannot be prepared. Reads no text."""
        if config.source.startswith("synthetic:") or is_shard_directory(config.source):
            raise ConfigError(
                "data.source",
                config.source,
                "must be text to be prepared",
                "name text files, a glob or stdlib",
            )
        refuse_unfinished(config.source)
        if config.format == "instruct":
            allowed = "is not prepared: conversations are encoded at the start of a run"
            raise ConfigError("data.format", config.format, allowed, "train on them as they are")
        self._config, self._tokenizer = config, tokenizer
        self.label = label(config.source)
        self.validation_source = config.validation_source
        self.notes: list[str] = []
        """Of the last pass over the documents."""
        self.has_records = False
        self.total = _stored_bytes(config.source)
        """Bytes of the files; None if their text has another size."""
        self.position = 0
        """Bytes of the documents that were given, of the last pass."""

    @property
    def has_validation(self) -> bool:
        """Whether data.validation_source names the held-out documents."""
        return self.validation_source is not None

    def documents(self) -> Iterator[SourceDocument]:
        """Yield the documents of data.source. Raises ConfigError as `Documents`."""
        self.position, self.has_records = 0, False
        config = self._config
        if parse(config.source, "data.source") is not None:
            self.notes = []
            yield from map(self._counted, map(_described, own_documents(config)))
        else:
            yield from map(self._counted, self._read(config.source, record_fields(config)))

    def refuse_nothing(self, count: int) -> None:
        """Raise ConfigError if the source gave no document with text."""
        if not count:
            allowed = "must hold at least one byte of text"
            raise ConfigError("data.source", self._config.source, allowed, "name a text")

    def validation(self) -> Iterator[SourceDocument]:
        """Yield the documents of data.validation_source."""
        assert self.validation_source is not None
        fields = record_fields(self._config, "data.validation_source")
        yield from self._read(self.validation_source, fields)

    def _read(self, source: str, fields: RecordFields) -> Iterator[SourceDocument]:
        if is_token_file(source):
            self.notes, self.has_records = [], True
            yield from self._token_documents(open_token_file(Path(source), fields.origin))
            return
        found = _Documents(source, fields)
        yield from map(_described, found)
        self.notes, self.has_records = found.notes, found.has_records

    def _counted(self, document: SourceDocument) -> SourceDocument:
        self.position += document.content.size
        return document

    def _token_documents(self, file: TokenFile) -> Iterator[SourceDocument]:
        """Yield the documents of a file of tokens, without their separators."""
        dtype = token_dtype(self._tokenizer.vocab_size)
        separator = self._tokenizer.separator
        for start, stop in file.documents(separator):
            token_N = file.token_N[start:stop]
            place = f"{file.path}, tokens {start} to {stop}"
            content = TokenContent(token_N, dtype, self._tokenizer.vocab_size, place)
            yield SourceDocument(content, place, file.path.stem)


def _described(document: Document) -> SourceDocument:
    content: Content
    if isinstance(document, _LargeFile):
        content = FileContent(document.path, document.found.st_size, document.found.st_mtime_ns)
    else:
        content = MemoryContent(document.content)
    return SourceDocument(content, document.name, document.domain, document.group_key)


def _stored_bytes(source: str) -> int | None:
    """Return the size of all files of a source; None where it says nothing of their text."""
    total = 0
    for entry in filter(None, map(str.strip, source.split(","))):
        path = Path(entry).expanduser()
        found: list[Path] = []
        # Errors are those of the reader, which comes next.
        with suppress(OSError):
            if path.is_file():
                found = [path]
            elif path.is_dir():
                found = list_directory(path).paths
            elif glob.has_magic(entry):
                found = list_glob(path).paths
            total += sum(each.stat().st_size for each in found)
        if not found or any(each.suffix.lower() in _PACKED for each in found):
            return None
    return total or None
