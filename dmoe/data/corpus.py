"""Documents of a corpus, without exact duplicates, and transformations of documents.

Documents with the same meaning in different words (translations, capitals) share a `group_key`:
they are in one split together (splits.py).

`NAME:ENTRY` is an entry's documents after a transformation, as a separate domain (`upper:guide:en`
is the domain `upper-en`). A transformation is a domain like a language, but it can be combined with
any language: with one module for a language and one for capitals, both together can be evaluated on
text that neither was trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from dmoe.config.errors import ConfigError
from dmoe.config.plugin_loader import construct
from dmoe.config.plugins import label, parse
from dmoe.config.schema import DataConfig


@dataclass(frozen=True)
class Document:
    """A file of text, or a record: bytes, path below the root of its entry, domain (de, ...)."""

    content: bytes
    name: str
    domain: str
    group_key: bytes = b""
    """Shared by documents with the same meaning (translations); empty: by none."""
    file: str = ""
    """The file of a record, which may hold others; empty: the document is a file."""

    @property
    def split_key(self) -> bytes:
        """The bytes whose hash decides the split."""
        return self.group_key or self.content


@dataclass(frozen=True)
class Corpus:
    """Documents without exact duplicates, in a fixed order, and notes for the user."""

    documents: tuple[Document, ...]
    notes: tuple[str, ...] = ()

    @property
    def document_domains(self) -> tuple[str, ...]:
        """The domain of each document."""
        return tuple(document.domain for document in self.documents)

    @property
    def bytes_per_domain(self) -> dict[str, int]:
        """Bytes by domain."""
        size: dict[str, int] = {}
        for document in self.documents:
            size[document.domain] = size.get(document.domain, 0) + len(document.content)
        return size

    @property
    def num_files(self) -> int:
        """Files that the documents are from."""
        return _num_files(self.documents)

    @property
    def num_bytes(self) -> int:
        """Bytes of all documents."""
        return sum(len(document.content) for document in self.documents)

    def contents(self) -> Iterator[bytes]:
        """Yield the bytes of each document."""
        return (document.content for document in self.documents)


def unique_documents(documents: Iterable[Document]) -> tuple[tuple[Document, ...], int]:
    """Remove empty documents and later duplicates; return the rest and the number removed."""
    seen: dict[bytes, Document] = {}
    total = 0
    for document in documents:
        total += 1
        if document.content:
            seen.setdefault(hashlib.sha256(document.content).digest(), document)
    return tuple(seen.values()), total - len(seen)


def own_corpus(config: DataConfig) -> Corpus | None:
    """Read the documents of a source of the user's own; None for a built-in one.

    Raises ConfigError on data.source: something else than documents, or none.
    """
    field = "data.source"
    if parse(config.source, field) is None:
        return None
    return corpus_of(list(own_documents(config)), field, label(config.source))


def own_documents(config: DataConfig) -> Iterator[Document]:
    """Yield the documents of a source of the user's own.

    Raises ConfigError on data.source: something else than documents.
    """
    field = "data.source"
    source = construct(config.source, field, options=config.source_options, methods=("documents",))
    for document in source.documents():
        if not isinstance(document, Document):
            allowed = (
                f"documents() gives a {type(document).__name__}, not dmoe.data.corpus.Document"
            )
            raise ConfigError(field, label(config.source), allowed, "see docs/plugins.md")
        yield document


def corpus_of(given: list[Document], field: str, value: str) -> Corpus:
    """Return a corpus of documents from Python. Raises ConfigError on `field` without any text."""
    documents, removed = unique_documents(given)
    if not documents:
        raise ConfigError(field, value, "gives no text", "give one document or more")
    return Corpus(documents, (f"duplicate or empty files left out ({removed})",) * bool(removed))


def count_files(count: int) -> str:
    """Return `1 file` or `2 files`."""
    return "1 file" if count == 1 else f"{count} files"


def count_documents(documents: Sequence[Document]) -> str:
    """Return `2 files` for as many files of text, `1 file, 10 documents` for a file of records."""
    files = count_files(_num_files(documents))
    if not any(document.file for document in documents):
        return files
    count = len(documents)
    return f"{files}, {count} document{'s' * (count != 1)}"


def _num_files(documents: Sequence[Document]) -> int:
    files = {document.file for document in documents if document.file}
    return len(files) + sum(not document.file for document in documents)


TRANSFORMS: dict[str, Callable[[str], str]] = {"upper": str.upper}
"""Functions from text to text by name.

`upper` follows Unicode: the German sharp s becomes SS; Japanese, Korean and Chinese do not change.
"""


def split_transform(entry: str) -> tuple[str | None, str]:
    """Split "upper:guide:en" into ("upper", "guide:en"); (None, entry) without a transformation."""
    name, colon, rest = entry.partition(":")
    return (name, rest) if colon and name in TRANSFORMS else (None, entry)


def transform_document(name: str, original: Document) -> Document:
    """Apply the transformation `name` and prefix it to name and domain.

    Bytes that are not UTF-8 do not change. The result is in the split of its original, so no model
    is evaluated on capitals of its training text.
    """
    return Document(
        _transform_bytes(name, original.content),
        f"{name}-{original.name}",
        f"{name}-{original.domain}",
        original.split_key,
        f"{name}-{original.file}" if original.file else "",
    )


def _transform_bytes(name: str, content: bytes) -> bytes:
    text = content.decode("utf-8", "surrogateescape")
    return TRANSFORMS[name](text).encode("utf-8", "surrogateescape")
