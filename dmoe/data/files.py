"""Which files below a path are text, and one sentence about each that is not.

Everything that `data.source` and `data.eval_source` read from disk is found here, so nothing is
left out or misread in silence:

- A file that holds no plain text (records such as JSON Lines or CSV, a compressed or binary file)
  is refused if it is named. In a directory, or among the matches of a glob, it is left out and
  counted in `Listing.left_out`, like hidden files, pipes, broken links and directories of shards.
- Links are followed, to files and to directories. A directory is read once, and a link to a
  directory that contains it is not followed.

The order of files is that of their path parts, so it depends on no file system.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

FORMAT, INDEX = "dmoe-shards", "index.json"
"""Format and name of the index of a directory of shards (shard_index.py)."""
PROBE_BYTES = 8192
"""Bytes at the beginning of a file that decide whether it is text."""
DECOMPRESS = "decompress it first"
EXTRACT = (
    "write the text of its records to .txt files, or name it .txt to train on its bytes as they are"
)
CONVERT = "write its text to a .txt file"
RECORD_SUFFIXES = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".jl"), "JSON Lines"),
    **dict.fromkeys((".csv", ".tsv", ".tab"), "CSV"),
    ".ipynb": "Jupyter",
}
"""Records that are text themselves: only the name tells."""
MAGIC: dict[bytes, tuple[str, str]] = {
    b"\x1f\x8b": ("gzip", DECOMPRESS),
    b"BZh": ("bzip2", DECOMPRESS),
    b"\xfd7zXZ": ("xz", DECOMPRESS),
    b"(\xb5/\xfd": ("zstandard", DECOMPRESS),
    b"PK\x03\x04": ("zip", "unpack it first"),
    b"PAR1": ("Parquet", EXTRACT),
    b"%PDF": ("PDF", CONVERT),
    b"{\\rtf": ("RTF", CONVERT),
    b"\xff\xfe": ("UTF-16", "convert it with iconv -t UTF-8"),
    b"\xfe\xff": ("UTF-16", "convert it with iconv -t UTF-8"),
}
"""First bytes of formats that hold text, but not as bytes that could be trained on."""
CONTROL = bytes(n for n in range(32) if chr(n) not in "\t\n\v\f\r\x1b")
"""Bytes that text hardly has."""


@dataclass
class Listing:
    """Files below a path in reading order, and what was found beside them."""

    paths: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of things by kind, a noun in the plural."""
    links: int = 0
    """Links that were followed."""

    def notes(self, place: object) -> list[str]:
        """Describe what was left out of `place`, and the links that were followed."""
        notes = []
        if self.left_out:
            counts = (f"{kind} ({count})" for kind, count in sorted(self.left_out.items()))
            notes.append(f"left out of {place}: {', '.join(counts)}")
        if self.links:
            notes.append(f"links followed in {place} ({self.links})")
        return notes


def special_kind(path: Path) -> str | None:
    """Say what `path` is if it is no plain file; None for a plain file and for nothing at all."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if not path.is_symlink():
            return None
        return "circular link" if error.errno == errno.ELOOP else "broken link"
    formats = {
        "directory": stat.S_IFDIR,
        "pipe": stat.S_IFIFO,
        "socket": stat.S_IFSOCK,
        "character device": stat.S_IFCHR,
        "block device": stat.S_IFBLK,
    }
    return next((name for name, value in formats.items() if stat.S_IFMT(mode) == value), None)


def other_format(path: Path, head: bytes) -> tuple[str, str] | None:
    """Return the format of a file that is not plain text, and what to do; None for text.

    Args:
        path: its suffix tells CSV and JSON Lines; .txt says that text is meant as it is.
        head: its first `PROBE_BYTES` bytes.
    """
    for magic, found in MAGIC.items():
        if head.startswith(magic):
            return found
    controls = sum(map(head.count, CONTROL))
    if controls > 1 and controls > len(head) / 50:
        return "binary", "name text files"
    suffix = path.suffix.lower()
    if suffix in RECORD_SUFFIXES:
        return RECORD_SUFFIXES[suffix], EXTRACT
    if suffix in ("", ".json") and _is_records(head):
        return "JSON records", EXTRACT
    return None


def _is_records(head: bytes) -> bool:
    """Return whether a text is JSON, an object per line or an array of objects."""
    if re.match(rb"\s*\[\s*\{", head):
        return True
    lines = [line for line in head.splitlines()[:3] if line.strip()]
    if len(lines) < 2 or not all(line.lstrip().startswith(b"{") for line in lines[:2]):
        return False
    try:
        return isinstance(json.loads(lines[0]), dict)
    except ValueError:
        return False


def keep_text(listing: Listing) -> None:
    """Move files of other formats from `paths` to `left_out`. Raises OSError."""
    text = []
    for path in listing.paths:
        with path.open("rb") as file:
            found = other_format(path, file.read(PROBE_BYTES))
        if found is None:
            text.append(path)
        else:
            listing.left_out[f"{found[0]} files"] += 1
    listing.paths = text


def list_directory(root: Path) -> Listing:
    """List the plain files below `root`, hidden ones left out. Raises OSError, e.g. no permission.

    Linked directories are visited after all real ones and in order of their paths, so that the
    listing does not depend on the order in which a file system returns names.
    """
    listing, seen = Listing(), {os.path.realpath(root)}
    real, linked = [root], list[Path]()
    while real or linked:
        if not real:
            linked.sort(key=lambda path: path.parts, reverse=True)
            link = linked.pop()
            target = os.path.realpath(link)
            if any(os.path.commonpath((target, place)) == target for place in seen):
                listing.left_out["links to directories that are read already or contain them"] += 1
                continue
            seen.add(target)
            listing.links += 1
            real.append(link)
        directory = real.pop()
        for entry in os.scandir(directory):
            path = directory / entry.name
            kind = special_kind(path)
            if entry.name.startswith(".") or entry.name == "__pycache__":
                listing.left_out["hidden names"] += 1
            elif kind == "directory":
                if holds_shards(path):
                    listing.left_out["directories of shards"] += 1
                elif entry.is_symlink():
                    linked.append(path)
                else:
                    seen.add(os.path.realpath(path))
                    real.append(path)
            elif kind is None:
                listing.paths.append(path)
                listing.links += entry.is_symlink()
            else:
                listing.left_out[f"{kind}s"] += 1
    listing.paths.sort(key=lambda path: path.parts)
    return listing


def list_glob(pattern: Path) -> Listing:
    """List the files that a glob matches. As in a shell, `*` matches no hidden name."""
    listing = Listing()
    for name in glob.glob(str(pattern), recursive=True):
        path = Path(name)
        kind = special_kind(path)
        if kind is None:
            listing.paths.append(path)
            listing.links += path.is_symlink()
        elif kind != "directory":
            listing.left_out[f"{kind}s"] += 1
        elif "**" not in pattern.parts:  # which enters directories
            listing.left_out["directories"] += 1
    listing.paths.sort(key=lambda path: path.parts)
    return listing


def holds_shards(directory: Path) -> bool:
    """Return whether a directory below a source, or one of several entries, holds shards."""
    try:
        with (directory / INDEX).open("rb") as file:
            return f'"{FORMAT}"'.encode() in file.read(200)
    except OSError:
        return False


def walk(
    root: Path, takes_file: Callable[[str], bool], enters_directory: Callable[[str], bool]
) -> Iterator[Path]:
    """Yield an installed package's files by name, ordered by path parts; links are not followed."""
    found = []
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if enters_directory(name)]
        found += [Path(directory, name) for name in files if takes_file(name)]
    yield from sorted(
        (path for path in found if path.is_file() and not path.is_symlink()),
        key=lambda path: path.parts,
    )


def literal_root(pattern: Path) -> Path:
    """Return the part of a glob before its first wildcard."""
    root = Path(pattern.anchor)
    for part in pattern.parts[len(root.parts) : -1]:
        if glob.has_magic(part):
            break
        root /= part
    return root
