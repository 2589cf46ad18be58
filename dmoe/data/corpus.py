"""Documents: what `data.source` names when it names text, and which of them training never sees.

A document is held out by a hash of its content, never by its place, so adding or removing a file moves no other file from one
side to the other. Exact duplicates are removed first: a file cannot be on both sides. Documents that say the same thing in different
words (translations, capitals) share a `twin` key, whose hash counts instead: they are on one side all together.

`NAME:ENTRY`: another entry's documents, changed, as a domain of their own (`upper:guide:en` is the domain `upper-en`).

A transformation is a domain like a language, but one that can be laid over any of them: with a module for a language and a module for
capitals, the two together can be tried on text that neither was trained on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from dmoe.config.errors import ConfigError


@dataclass(frozen=True)
class Document:
    """One file: its bytes as they are, its path below the root of its entry, and its domain (python, de, ...)."""

    content: bytes
    name: str
    domain: str
    twin: bytes = b""
    """What it shares with documents that say the same; empty: nothing."""

    @property
    def key(self) -> bytes:
        """What decides whether it is held out."""
        return self.twin or self.content


@dataclass(frozen=True)
class Corpus:
    """Documents without exact duplicates, in a fixed order, and remarks a user should see (what was left out, and why)."""

    documents: tuple[Document, ...]
    notes: tuple[str, ...] = ()

    @property
    def domains(self) -> dict[str, int]:
        """Bytes of each domain."""
        size: dict[str, int] = {}
        for document in self.documents:
            size[document.domain] = size.get(document.domain, 0) + len(document.content)
        return size

    @property
    def size(self) -> int:
        """Bytes of all documents."""
        return sum(len(document.content) for document in self.documents)


def unique_documents(documents: list[Document]) -> tuple[tuple[Document, ...], int]:
    """The first of each content, and how many were removed. Order is kept; empty documents are removed too."""
    seen: dict[bytes, Document] = {}
    for document in documents:
        if document.content:
            seen.setdefault(hashlib.sha256(document.content).digest(), document)
    return tuple(seen.values()), len(documents) - len(seen)


def held_out_fraction(key: bytes) -> float:
    """Where a document stands between 0 and 1: it is held out if this is less than data.holdout."""
    # Salted, so that the split is independent of any other use of a file's SHA-256.
    return int.from_bytes(hashlib.sha256(b"dmoe holdout\0" + key).digest()[:8], "big") / 2**64


def split_corpus(corpus: Corpus, holdout: float) -> tuple[Corpus, Corpus]:
    """(train, held out). A corpus of one document is cut instead: its last `holdout` share is held out, and a note says so.

    Raises ConfigError on data.holdout when it is not between 0 and 1, or when it leaves one side empty.
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
    fractions = [held_out_fraction(document.key) for document in corpus.documents]
    train = tuple(d for d, f in zip(corpus.documents, fractions, strict=True) if f >= holdout)
    held_out = tuple(d for d, f in zip(corpus.documents, fractions, strict=True) if f < holdout)
    if not held_out:
        enough = math.ceil(min(fractions) * 1e4 + 1) / 1e4
        fix = f"set data.holdout={enough:.4f}" if enough < 1 else "add more files"
        raise _one_sided(holdout, "no", len(train), fix)
    if not train:
        raise _one_sided(
            holdout, "every", len(held_out), f"set data.holdout={max(fractions) * 0.999:.4f}"
        )
    return Corpus(train, corpus.notes), Corpus(held_out)


def _cut_document(corpus: Corpus, holdout: float) -> tuple[Corpus, Corpus]:
    document = corpus.documents[0]
    cut = round(len(document.content) * (1 - holdout))
    # Not inside a character: UTF-8 continuation bytes are 10xxxxxx.
    while 0 < cut < len(document.content) and document.content[cut] & 0xC0 == 0x80:
        cut -= 1
    if not 0 < cut < len(document.content):
        raise ConfigError(
            "data.holdout", holdout, f"must cut the single document of {len(document.content)} bytes in two",
            "use a longer text or a share nearer to 0.5",
        )  # fmt: skip
    note = f"one document: its last {holdout:.2%} held out"
    return (
        Corpus(
            (replace(document, content=document.content[:cut], twin=document.key),),
            (*corpus.notes, note),
        ),
        Corpus((replace(document, content=document.content[cut:], twin=document.key),)),
    )


def _one_sided(holdout: float, which: str, count: int, fix: str) -> ConfigError:
    return ConfigError(
        "data.holdout", holdout, f"must leave documents to both sides, but by its hash {which} one of {count} is held out",
        f"{fix} or join the documents into one file, whose end is then held out",
    )  # fmt: skip


TRANSFORMS: dict[str, Callable[[str], str]] = {"upper": str.upper}
"""Each gives text for text. `upper` is Unicode's: German sharp s becomes SS; Japanese, Korean and Chinese stay as they are."""


def split_transform(entry: str) -> tuple[str | None, str]:
    """("upper", "guide:en") of "upper:guide:en"; (None, entry) where no transformation stands in front."""
    name, colon, rest = entry.partition(":")
    return (name, rest) if colon and name in TRANSFORMS else (None, entry)


def transformed(name: str, documents: list[Document]) -> list[Document]:
    """The documents as `name` changes them, with its name before theirs. Bytes that are not UTF-8 stay as they are.

    They are held out where the originals are: no model is tried on capitals of what it was trained on.
    """
    return [
        Document(
            _changed(name, original.content),
            f"{name}-{original.name}",
            f"{name}-{original.domain}",
            original.key,
        )
        for original in documents
    ]


def _changed(name: str, content: bytes) -> bytes:
    return TRANSFORMS[name](content.decode("utf-8", "surrogateescape")).encode(
        "utf-8", "surrogateescape"
    )
