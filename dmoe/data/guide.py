"""`guide:LANG`: Debian's installation guide in one of 19 languages: the same book, so what differs between two is the language.

The pages are those of the package installation-guide-amd64 (GPL-2): installed, or in the cache (guide_cache.py). A page is a
document. A page that is held out in one language is held out in all, so that no model has read its translation, and all languages are
tried on the same text.

Translations have gaps: up to a quarter of an edition's text is still English. A paragraph of more than 40 characters that the English
edition has too is therefore left out of the others, and so is one that stood in the edition before (warnings that are repeated from
chapter to chapter).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dmoe.config.errors import ConfigError
from dmoe.data.corpus import Document
from dmoe.data.guide_cache import PACKAGE, Unavailable, guide_root
from dmoe.data.html_text import html_paragraphs

__all__ = ["LANGUAGES", "read_guide"]

LANGUAGES = (
    "ca", "cs", "da", "de", "el", "en", "es", "fr", "id", "it", "ja", "ko", "nl", "pt", "ro", "ru", "sv", "vi", "zh_CN",
)  # fmt: skip
_LONG = 40
"""Characters up to which a paragraph may come again: headings, names of commands."""


def read_guide(language: str, field: str) -> list[Document]:
    """The pages of one language, in the order of their names; the domain is the language. A quarter of a second.

    Raises ConfigError on `field`: no such language, or the guide is nowhere and cannot be fetched.
    """
    entry = f"guide:{language}"
    if language not in LANGUAGES:
        raise ConfigError(field, entry, f"must name one of the guide's languages, {' '.join(LANGUAGES)}", "use one of these")
    try:
        root = guide_root()
        seen = {text for _, page in _pages(root, "en") for text in page if len(text) > _LONG} if language != "en" else set()
        return [_document(language, name, page, seen) for name, page in _pages(root, language)]
    except Unavailable as error:
        fix = f"install that package (apt-get install {PACKAGE}), or name text files instead"
        raise ConfigError(field, entry, f"needs Debian's package {PACKAGE}, and {error}", fix) from error
    except OSError as error:
        raise ConfigError(
            field, entry, f"must be readable, but {error.filename} is not ({error.strerror})", "check it"
        ) from error


def _pages(root: Path, language: str) -> Iterator[tuple[str, list[str]]]:
    """(name, paragraphs) of each page."""
    paths = sorted((root / language).glob("*.html"))
    if not paths:
        raise Unavailable(f"{root / language} holds no page of it")
    for path in paths:
        yield path.name, html_paragraphs(path.read_text("utf-8", "replace"))


def _document(language: str, name: str, page: list[str], seen: set[str]) -> Document:
    """A page without the long paragraphs that were seen; its own are added to them."""
    kept = []
    for text in page:
        if text not in seen:
            kept.append(text)
        if len(text) > _LONG:
            seen.add(text)
    return Document("".join(f"{text}\n" for text in kept).encode(), f"{language}/{name}", language, f"guide:{name}".encode())
