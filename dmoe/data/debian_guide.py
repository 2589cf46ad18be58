"""The Debian installation guide in 19 languages as a corpus: `guide:LANG`.

All editions are the same book, so two of them differ in the language only. The pages are those of
the package installation-guide-amd64 (GPL-2), read from where the package is installed or from a
cache. Each page is a document. A page that is held out in one language is held out in all of them,
so no model has read its translation, and all languages are evaluated on the same text.

Translations have gaps: up to a quarter of an edition is still English. A paragraph of more than 40
characters that also occurs in the English edition is therefore left out of the others, and so is
one that occurred earlier in the same edition (warnings repeated in each chapter).

The cache is filled once, without root: `apt-get download` fetches the package from the configured
archives, and `dpkg-deb -x` unpacks it. The complete pages are renamed into the cache, so a process
that is killed before leaves no partial cache. Under torchrun every rank opens the data: the first
one locks the cache and fetches, the others wait. On a file system without locks several ranks
fetch, and the first rename counts.

Pages are converted to paragraphs of plain text with the standard library: head, scripts, styles and
navigation are dropped; a block tag ends a paragraph; white space is joined, except inside `pre`,
where each line is a paragraph.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from html.parser import HTMLParser
from pathlib import Path

from dmoe.config.errors import ConfigError
from dmoe.data.corpus import Document

LANGUAGES = (
    "ca", "cs", "da", "de", "el", "en", "es", "fr", "id", "it",
    "ja", "ko", "nl", "pt", "ro", "ru", "sv", "vi", "zh_CN",
)  # fmt: skip
PACKAGE = "installation-guide-amd64"
INSTALLED = Path("/usr/share/doc") / PACKAGE
_MAX_REPEATED_CHARS = 40
"""Longest paragraph that may be repeated: headings, names of commands."""
_DOWNLOAD_SECONDS = 180
_UNPACK_SECONDS = 60


class GuideUnavailableError(Exception):
    """The guide is not installed, not cached, and cannot be fetched; the text says why."""


def read_guide(language: str, field: str) -> list[Document]:
    """Read the pages of one language, ordered by name; the domain is the language.

    Takes a quarter of a second. Raises ConfigError on `field`: no such language, or the guide is
    not available.
    """
    entry = f"guide:{language}"
    if language not in LANGUAGES:
        raise ConfigError(
            field,
            entry,
            f"must name one of the guide's languages, {' '.join(LANGUAGES)}",
            "use one of these",
        )
    try:
        root = guide_root()
        seen = (
            {
                text
                for _, page in _pages(root, "en")
                for text in page
                if len(text) > _MAX_REPEATED_CHARS
            }
            if language != "en"
            else set()
        )
        return [_document(language, name, page, seen) for name, page in _pages(root, language)]
    except GuideUnavailableError as error:
        fix = f"install that package (apt-get install {PACKAGE}), or name text files instead"
        raise ConfigError(
            field, entry, f"needs Debian's package {PACKAGE}, and {error}", fix
        ) from error
    except OSError as error:
        raise ConfigError(
            field,
            entry,
            f"must be readable, but {error.filename} is not ({error.strerror})",
            "check it",
        ) from error


def _pages(root: Path, language: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (name, paragraphs) of each page."""
    paths = sorted((root / language).glob("*.html"))
    if not paths:
        raise GuideUnavailableError(f"{root / language} holds no page of it")
    for path in paths:
        yield path.name, html_paragraphs(path.read_text("utf-8", "replace"))


def _document(language: str, name: str, page: list[str], seen: set[str]) -> Document:
    """Return a page without the long paragraphs in `seen`; add its own to them."""
    kept = []
    for text in page:
        if text not in seen:
            kept.append(text)
        if len(text) > _MAX_REPEATED_CHARS:
            seen.add(text)
    return Document(
        "".join(f"{text}\n" for text in kept).encode(),
        f"{language}/{name}",
        language,
        f"guide:{name}".encode(),
    )


def guide_root() -> Path:
    """Return the directory that holds one directory of pages per language; fetch it if missing.

    Fetches 18 MB. Raises GuideUnavailableError if that is not possible.
    """
    cached = cache_directory() / PACKAGE
    for root in (INSTALLED, cached):
        if _is_guide(root):
            return root
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with _locked(cached.parent / f"{PACKAGE}.lock"):
            # Another process may have fetched it while this one waited.
            if not _is_guide(cached):
                _fetch(cached)
    except OSError as error:
        raise GuideUnavailableError(
            f"the cache {cached.parent} cannot be written ({error.strerror})"
        ) from error
    return cached


def cache_directory() -> Path:
    """Return $XDG_CACHE_HOME/dmoe, or ~/.cache/dmoe."""
    # XDG Base Directory specification: a relative path is invalid and must be ignored.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "dmoe"


def _is_guide(root: Path) -> bool:
    return (root / "en" / "index.html").is_file()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive file lock; the kernel releases it when the process ends."""
    with path.open("a") as file:
        # A file system without locks: see the module's docstring.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{PACKAGE}-") as folder:
        _run(["apt-get", "download", PACKAGE], folder, _DOWNLOAD_SECONDS)
        packages = list(Path(folder).glob("*.deb"))
        if len(packages) != 1:
            raise GuideUnavailableError(f"apt-get left {len(packages)} packages")
        _run(["dpkg-deb", "-x", packages[0].name, "unpacked"], folder, _UNPACK_SECONDS)
        pages = Path(folder, "unpacked", "usr", "share", "doc", PACKAGE)
        if not _is_guide(pages):
            raise GuideUnavailableError(f"the package holds no page {pages.name}/en/index.html")
        # An incomplete target: a complete one would not be fetched again.
        if target.exists():
            shutil.rmtree(target)
        try:
            os.rename(pages, target)
        except OSError:
            # On a file system without locks, another process may have been first.
            if not _is_guide(target):
                raise


def _run(command: list[str], folder: str, seconds: int) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            timeout=seconds,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
        )
    except FileNotFoundError as error:
        raise GuideUnavailableError(f"there is no {command[0]} here") from error
    except subprocess.TimeoutExpired as error:
        raise GuideUnavailableError(f"`{' '.join(command)}` took more than {seconds} s") from error
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        reason = lines[-1] if lines else f"exit code {done.returncode}"
        raise GuideUnavailableError(f"`{' '.join(command)}` failed ({reason})")


_DROPPED = frozenset({"head", "script", "style", "nav"})
_BLOCKS = frozenset((
    "address", "article", "aside", "blockquote", "body", "br", "dd", "details", "div", "dl", "dt",
    "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr",
    "html", "li", "main", "ol", "p", "pre", "section", "summary", "table", "tbody", "td", "tfoot",
    "th", "thead", "tr", "ul",
))  # fmt: skip


def html_paragraphs(html: str) -> list[str]:
    """Return the non-empty paragraphs of a page, in order. Damaged HTML raises no error."""
    parser = _ParagraphParser()
    parser.feed(html)
    parser.close()
    parser.end_paragraph()
    return parser.paragraphs


class _ParagraphParser(HTMLParser):
    """Collects the paragraphs of a page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._open: list[str] = []
        """Text of the paragraph that has not ended yet."""
        self._dropping: list[str] = []
        """Tag of the dropped element, once per open element of that name inside it."""
        self._preformatted = False

    def end_paragraph(self) -> None:
        text = "".join(self._open)
        self._open.clear()
        lines = text.splitlines() if self._preformatted else [text]
        self.paragraphs += [
            joined for joined in (" ".join(line.split()) for line in lines) if joined
        ]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._dropping:
            # A head may end without its end tag.
            if tag == "body":
                self._dropping.clear()
            elif tag == self._dropping[0]:
                self._dropping.append(tag)
            return
        if tag in _BLOCKS:
            self.end_paragraph()
        if tag in _DROPPED or _is_navigation(attrs):
            self._dropping.append(tag)
        elif tag == "pre":
            self._preformatted = True

    def handle_endtag(self, tag: str) -> None:
        if self._dropping:
            if tag == self._dropping[0]:
                self._dropping.pop()
            return
        if tag in _BLOCKS:
            self.end_paragraph()
        if tag == "pre":
            self._preformatted = False

    def handle_data(self, data: str) -> None:
        if not self._dropping:
            self._open.append(data)


def _is_navigation(attrs: list[tuple[str, str | None]]) -> bool:
    """Return whether a `div` is navigation: DocBook's pages do not use the tag `nav`."""
    return any(name == "class" and value in ("navheader", "navfooter") for name, value in attrs)
