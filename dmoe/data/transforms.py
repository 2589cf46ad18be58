"""`NAME:ENTRY`: another entry's documents, changed, as a domain of their own (`upper:guide:en` is the domain `upper-en`).

A transformation is a domain like a language, but one that can be laid over any of them: with a module for a language and a module for
capitals, the two together can be tried on text that neither was trained on.
"""

from __future__ import annotations

from collections.abc import Callable

from dmoe.data.corpus import Document

__all__ = ["TRANSFORMS", "split_transform", "transformed"]

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
        Document(_changed(name, original.content), f"{name}-{original.name}", f"{name}-{original.domain}", original.key)
        for original in documents
    ]


def _changed(name: str, content: bytes) -> bytes:
    return TRANSFORMS[name](content.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
