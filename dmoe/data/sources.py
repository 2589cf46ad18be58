"""Where documents come from: Python's own library, text files, globs, directories.

`data.source` holds entries separated by commas. The domain of a document is the entry it came from, by name: `python` for the
standard library, else the last part of the entry before any wildcard (`texts/de/**/*.txt` gives `de`, `a/kjv.txt` gives `kjv`).
"""

from __future__ import annotations

import glob
import importlib.util
import logging
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from dmoe.config.errors import ConfigError
from dmoe.data.corpus import Corpus, Document, unique_documents

__all__ = ["read_corpus"]

_log = logging.getLogger(__name__)
_ALLOWED = "must be stdlib, text files, globs or directories separated by commas, a directory of shards, or synthetic:KIND"
# Tests are left out because they are long, repetitive tables; packages because they depend on what is installed.
_NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_BINARY_PROBE = 8192


def read_corpus(source: str) -> Corpus:
    """All documents of `data.source`, duplicates removed, in the order of the entries and of the paths within an entry.

    Contents are raw bytes. A file that an entry names, or a glob matches, is always taken; of a directory, hidden files and
    binary ones (a NUL in the first 8 KiB) are left out and counted in the notes. Raises ConfigError on data.source: nothing
    found, a missing or unreadable file, only empty files.
    """
    entries = [entry.strip() for entry in source.split(",") if entry.strip()]
    documents: list[Document] = []
    notes: list[str] = []
    for entry in entries:
        found = _read_library(source, notes) if entry == "stdlib" else _read_entry(source, entry, notes)
        documents.extend(found)
    unique, removed = unique_documents(documents)
    if removed:
        notes.append(f"{removed} duplicate or empty files left out")
    if not unique:
        raise ConfigError("data.source", source or "''", f"{_ALLOWED}, and hold at least one byte of text", "name a text")
    return Corpus(unique, tuple(notes))


def _read_library(source: str, notes: list[str]) -> list[Document]:
    """Python's standard library; torch's Python files where the library is zipped."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = list(_walk(root, _is_library_file, _is_library_directory))
    if not paths:
        # find_spec of a top-level name locates the package without importing it.
        spec = importlib.util.find_spec("torch")
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(
                "data.source", source, f"found no .py file of the standard library in {root}, nor torch's", "name a text file"
            )
        root = Path(spec.submodule_search_locations[0])
        notes.append(f"no standard library source in {sysconfig.get_paths()['stdlib']}: torch's own source is used instead")
        _log.warning("data.source=stdlib: %s", notes[-1])
        paths = list(_walk(root, _is_library_file, _is_library_directory))
    return [_read(source, path, f"python/{path.relative_to(root).as_posix()}", "python") for path in paths]


def _is_library_directory(name: str) -> bool:
    # config-3.11-x86_64-linux-gnu and the like describe the machine this Python was built on.
    return name not in _NOT_LIBRARY and not name.startswith((".", "config-"))


def _is_library_file(name: str) -> bool:
    return (
        name.endswith(".py") and not name.startswith("_sysconfigdata") and name not in ("sitecustomize.py", "usercustomize.py")
    )


def _read_entry(source: str, entry: str, notes: list[str]) -> list[Document]:
    path = Path(entry).expanduser()
    if path.is_dir():
        return _read_directory(source, path, notes)
    if path.is_file():
        return [_read(source, path, f"{path.stem}/{path.name}", path.stem)]
    if not glob.has_magic(entry):
        raise ConfigError("data.source", entry, f"{_ALLOWED}, and there is no such file", "check the path")
    root = _literal_root(path)
    matches = sorted((Path(match) for match in glob.glob(str(path), recursive=True)), key=lambda match: match.parts)
    files = [match for match in matches if match.is_file()]
    if not files:
        raise ConfigError("data.source", entry, f"{_ALLOWED}, and no file matches this glob", "check it with ls, and quote it")
    domain = root.resolve().name
    return [_read(source, match, f"{domain}/{match.relative_to(root).as_posix()}", domain) for match in files]


def _read_directory(source: str, root: Path, notes: list[str]) -> list[Document]:
    domain = root.resolve().name
    documents = [
        _read(source, path, f"{domain}/{path.relative_to(root).as_posix()}", domain)
        for path in _walk(root, _is_visible, _is_visible)
    ]
    text = [document for document in documents if b"\0" not in document.content[:_BINARY_PROBE]]
    if len(text) < len(documents):
        notes.append(f"{len(documents) - len(text)} binary files of {root} left out")
    if not text:
        raise ConfigError("data.source", root, f"{_ALLOWED}, and this directory holds no text file", "check the path")
    return text


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__pycache__"


def _literal_root(path: Path) -> Path:
    """The part of a glob before its first wildcard."""
    root = Path(path.anchor)
    for part in path.parts[len(root.parts) : -1]:
        if glob.has_magic(part):
            break
        root /= part
    return root


def _walk(root: Path, wanted: Callable[[str], bool], entered: Callable[[str], bool]) -> Iterator[Path]:
    """Regular files below root with a wanted name, ordered by their path's parts; links are not followed."""
    found = []
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if entered(name)]
        found += [Path(directory, name) for name in files if wanted(name)]
    yield from sorted((path for path in found if path.is_file() and not path.is_symlink()), key=lambda path: path.parts)


def _read(source: str, path: Path, name: str, domain: str) -> Document:
    try:
        return Document(path.read_bytes(), name, domain)
    except OSError as error:
        raise ConfigError(
            "data.source", source, f"must be readable, but {path} is not ({error.strerror})", "check the file"
        ) from error
