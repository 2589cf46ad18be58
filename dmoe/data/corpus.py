"""Documents of a corpus, the train / held-out split, and transformations of documents.

A document is held out by a hash of its content, never by its position, so adding or removing a file
moves no other file to the other split. Exact duplicates are removed first: no file is in both
splits. Documents with the same meaning in different words (translations, capitals) share a
`group_key`, whose hash is used instead: they are in one split together.

`NAME:ENTRY` is an entry's documents after a transformation, as a separate domain (`upper:guide:en`
is the domain `upper-en`). A transformation is a domain like a language, but it can be combined with
any language: with one module for a language and one for capitals, both together can be evaluated on
text that neither was trained on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from dmoe.config.errors import ConfigError
from dmoe.config.plugin_loader import construct
from dmoe.config.plugins import label, parse
from dmoe.config.schema import DataConfig


@dataclass(frozen=True)
class Document:
    """One file: raw bytes, path below the root of its entry, domain (python, de, ...)."""

    content: bytes
    name: str
    domain: str
    group_key: bytes = b""
    """Shared by documents with the same meaning (translations); empty: by none."""

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
    def num_bytes(self) -> int:
        """Bytes of all documents."""
        return sum(len(document.content) for document in self.documents)

    def contents(self) -> Iterator[bytes]:
        """Yield the bytes of each document."""
        return (document.content for document in self.documents)


def unique_documents(documents: list[Document]) -> tuple[tuple[Document, ...], int]:
    """Remove empty documents and later duplicates; return the rest and the number removed."""
    seen: dict[bytes, Document] = {}
    for document in documents:
        if document.content:
            seen.setdefault(hashlib.sha256(document.content).digest(), document)
    return tuple(seen.values()), len(documents) - len(seen)


def own_corpus(config: DataConfig) -> Corpus | None:
    """Read the documents of a source of the user's own; None for a built-in one.

    Raises ConfigError on data.source: something else than documents, or none.
    """
    field = "data.source"
    if parse(config.source, field) is None:
        return None
    source = construct(config.source, field, options=config.source_options, methods=("documents",))
    given = list(source.documents())
    for document in given:
        if not isinstance(document, Document):
            allowed = (
                f"documents() gives a {type(document).__name__}, not dmoe.data.corpus.Document"
            )
            raise ConfigError(field, label(config.source), allowed, "see docs/plugins.md")
    return corpus_of(given, field, label(config.source))


def corpus_of(given: list[Document], field: str, value: str) -> Corpus:
    """Return a corpus of documents from Python. Raises ConfigError on `field` without any text."""
    documents, removed = unique_documents(given)
    if not documents:
        raise ConfigError(field, value, "gives no text", "give one document or more")
    return Corpus(documents, (f"duplicate or empty files left out ({removed})",) * bool(removed))


def count_files(count: int) -> str:
    """Return `1 file` or `2 files`."""
    return "1 file" if count == 1 else f"{count} files"


def holdout_hash(key: bytes) -> float:
    """Hash a split key to [0, 1): the document is held out if this is less than data.holdout."""
    # Salted, so that the split is independent of any other use of a file's SHA-256.
    return int.from_bytes(hashlib.sha256(b"dmoe holdout\0" + key).digest()[:8], "big") / 2**64


def split_corpus(corpus: Corpus, holdout: float) -> tuple[Corpus, Corpus]:
    """Split a corpus into (train, held out).

    A corpus of one document is cut instead: its last `holdout` share is held out, and a note says
    so. Raises ConfigError on data.holdout: not between 0 and 1, or one split would be empty.
    """
    if not 0 < holdout < 1:
        raise ConfigError(
            "data.holdout",
            holdout,
            "must be greater than 0 and less than 1",
            "set data.holdout=0.05",
        )
    if len(corpus.documents) == 1:
        return _cut_document(corpus, holdout)
    fractions = [holdout_hash(document.split_key) for document in corpus.documents]
    train = tuple(d for d, f in zip(corpus.documents, fractions, strict=True) if f >= holdout)
    held_out = tuple(d for d, f in zip(corpus.documents, fractions, strict=True) if f < holdout)
    if not held_out:
        enough = math.ceil(min(fractions) * 1e4 + 1) / 1e4
        fix = f"set data.holdout={enough:.4f}" if enough < 1 else "add more files"
        raise _empty_split_error(holdout, "no", len(train), fix)
    if not train:
        raise _empty_split_error(
            holdout, "every", len(held_out), f"set data.holdout={max(fractions) * 0.999:.4f}"
        )
    return Corpus(train, corpus.notes), Corpus(held_out)


def _cut_document(corpus: Corpus, holdout: float) -> tuple[Corpus, Corpus]:
    document = corpus.documents[0]
    cut = round(len(document.content) * (1 - holdout))
    # Do not cut inside a character: UTF-8 continuation bytes are 10xxxxxx.
    while 0 < cut < len(document.content) and document.content[cut] & 0xC0 == 0x80:
        cut -= 1
    if not 0 < cut < len(document.content):
        raise ConfigError(
            "data.holdout",
            holdout,
            f"must cut the single document of {len(document.content)} bytes in two",
            "use a longer text or a share nearer to 0.5",
        )
    note = f"one document: its last {holdout:.2%} held out"
    parts = [
        replace(document, content=content, group_key=document.split_key)
        for content in (document.content[:cut], document.content[cut:])
    ]
    return Corpus((parts[0],), (*corpus.notes, note)), Corpus((parts[1],))


def _empty_split_error(holdout: float, which: str, count: int, fix: str) -> ConfigError:
    return ConfigError(
        "data.holdout",
        holdout,
        f"must leave documents to both sides, but by its hash {which} one of {count} is held out",
        f"{fix} or join the documents into one file, whose end is then held out",
    )


TRANSFORMS: dict[str, Callable[[str], str]] = {"upper": str.upper}
"""Functions from text to text by name.

`upper` follows Unicode: the German sharp s becomes SS; Japanese, Korean and Chinese do not change.
"""


def split_transform(entry: str) -> tuple[str | None, str]:
    """Split "upper:guide:en" into ("upper", "guide:en"); (None, entry) without a transformation."""
    name, colon, rest = entry.partition(":")
    return (name, rest) if colon and name in TRANSFORMS else (None, entry)


def apply_transform(name: str, documents: list[Document]) -> list[Document]:
    """Apply the transformation `name` and prefix it to names and domains.

    Bytes that are not UTF-8 do not change. Results are in the split of their originals, so no model
    is evaluated on capitals of its training text.
    """
    return [
        Document(
            _transform_bytes(name, original.content),
            f"{name}-{original.name}",
            f"{name}-{original.domain}",
            original.split_key,
        )
        for original in documents
    ]


def _transform_bytes(name: str, content: bytes) -> bytes:
    text = content.decode("utf-8", "surrogateescape")
    return TRANSFORMS[name](text).encode("utf-8", "surrogateescape")
