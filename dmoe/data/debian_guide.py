"""`guide:LANG`: Debian's installation guide in one of 19 languages: the same book, so what differs between two is the language.

The pages are those of the package installation-guide-amd64 (GPL-2): installed, or in the cache (guide_cache.py). A page is a
document. A page that is held out in one language is held out in all, so that no model has read its translation, and all languages are
tried on the same text.

Translations have gaps: up to a quarter of an edition's text is still English. A paragraph of more than 40 characters that the English
edition has too is therefore left out of the others, and so is one that stood in the edition before (warnings that are repeated from
chapter to chapter).

Where the installation guide lies: installed, in the cache, or fetched into the cache once.

Fetching needs no root: `apt-get download` takes the package from the archives this machine is set up with, `dpkg-deb -x` unpacks it.
The pages are renamed into the cache when they are whole, so a process that is killed on the way leaves nothing that looks like them.
Under torchrun every rank opens the data: the first takes the cache's lock and fetches, the others wait for it. Where a file system has
no locks, several fetch, and the first rename counts.

HTML to paragraphs of plain text, with the standard library alone.

What is no text of the page (head, scripts, styles, navigation) is dropped; a block tag ends a paragraph; white space is joined, except
inside `pre`, where each line is a paragraph of its own.
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
        raise ConfigError(
            field,
            entry,
            f"must name one of the guide's languages, {' '.join(LANGUAGES)}",
            "use one of these",
        )
    try:
        root = guide_root()
        seen = (
            {text for _, page in _pages(root, "en") for text in page if len(text) > _LONG}
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
    """(name, paragraphs) of each page."""
    paths = sorted((root / language).glob("*.html"))
    if not paths:
        raise GuideUnavailableError(f"{root / language} holds no page of it")
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
    return Document(
        "".join(f"{text}\n" for text in kept).encode(),
        f"{language}/{name}",
        language,
        f"guide:{name}".encode(),
    )


PACKAGE = "installation-guide-amd64"
INSTALLED = Path("/usr/share/doc") / PACKAGE
_DOWNLOAD_SECONDS = 180
_UNPACK_SECONDS = 60


class GuideUnavailableError(Exception):
    """The guide is nowhere and cannot be fetched; the text says why."""


def guide_root() -> Path:
    """The directory with one directory of pages for each language; 18 MB are fetched if there is none.

    Raises Unavailable where that is not possible.
    """
    cached = cache_directory() / PACKAGE
    for root in (INSTALLED, cached):
        if _is_guide(root):
            return root
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with _locked(cached.parent / f"{PACKAGE}.lock"):
            if not _is_guide(cached):  # another process has fetched it while this one waited
                _fetch(cached)
    except OSError as error:
        raise GuideUnavailableError(
            f"the cache {cached.parent} cannot be written ({error.strerror})"
        ) from error
    return cached


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/dmoe, or ~/.cache/dmoe."""
    # The XDG specification: a relative path is invalid and is to be ignored.
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "dmoe"


def _is_guide(root: Path) -> bool:
    return (root / "en" / "index.html").is_file()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the kernel's lock on a file; it ends with the process that holds it, however that process dies."""
    with path.open("a") as file:
        with suppress(OSError):  # a file system without locks: see the module's docstring
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
        if (
            target.exists()
        ):  # what a person has left of it: not whole, or _fetch would not have been called
            shutil.rmtree(target)
        try:
            os.rename(pages, target)
        except OSError:
            if not _is_guide(
                target
            ):  # else another process, on a file system without locks, was first
                raise


def _run(command: list[str], folder: str, seconds: int) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, timeout=seconds, env={**os.environ, "LC_ALL": "C"}, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise GuideUnavailableError(f"there is no {command[0]} here") from error
    except subprocess.TimeoutExpired as error:
        raise GuideUnavailableError(f"`{' '.join(command)}` took more than {seconds} s") from error
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines() or [
            f"exit code {done.returncode}"
        ]
        raise GuideUnavailableError(f"`{' '.join(command)}` failed ({said[-1]})")


_DROPPED = frozenset({"head", "script", "style", "nav"})
_BLOCKS = frozenset((
    "address", "article", "aside", "blockquote", "body", "br", "dd", "details", "div", "dl", "dt", "figcaption", "figure", "footer",
    "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "html", "li", "main", "ol", "p", "pre", "section", "summary", "table",
    "tbody", "td", "tfoot", "th", "thead", "tr", "ul",
))  # fmt: skip


def html_paragraphs(html: str) -> list[str]:
    """The paragraphs of a page, in order, none empty. Damaged HTML raises nothing: what can be read is read."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    reader.end_paragraph()
    return reader.paragraphs


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._open: list[str] = []
        """The pieces of the paragraph that has not ended yet."""
        self._dropping: list[str] = []
        """The dropped element's tag, once for each element of that name that is open inside."""
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
            if tag == "body":  # a head may end without its end tag
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
    """DocBook's pages are older than the tag `nav`: theirs is a `div` of one of these classes."""
    return any(name == "class" and value in ("navheader", "navfooter") for name, value in attrs)
