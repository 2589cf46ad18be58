"""Which files below a path are read, and a count of each kind that is not.

Everything that `data.source`, `data.validation_source` and `data.eval_source` read from disk is
found here, so nothing is left out or misread in silence:

- A file that holds neither text nor records (formats/detect.py) is refused if it is named. In a
  directory, or among the matches of a glob, it is left out and counted in `Listing.left_out`, like
  hidden files, pipes, broken links and directories of shards.
- Files of text and files of records in one directory are refused: which are meant is not known.
- Links are followed, to files and to directories. A directory is read once, and a link to a
  directory that contains it is not followed.

The order of files is that of their path parts, so it depends on no file system.
"""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dmoe.config.errors import ConfigError
from dmoe.data.formats.detect import Format, format_of, is_saved_dataset

FORMAT, INDEX = "dmoe-shards", "index.json"
"""Format and name of the index of a directory of shards (shard_index.py)."""
PARTS, PLAN = "parts", "plan.json"
"""Directory, and a file in it, that an unfinished preparation has (prepare/)."""


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


def formats_of(listing: Listing, place: object, origin: str) -> list[tuple[Path, Format]]:
    """Return the files of a listing with their formats; count the others in `left_out`.

    Args:
        listing: whose `paths` are looked at; those of text or of records stay there.
        place: the entry, for the error.
        origin: the config field that names it.

    Raises:
        ConfigError: a file that cannot be read or is damaged; text beside records. A file of text
            is one document and a record is one: which of them is meant cannot be guessed, and a
            README beside the records would be trained on.
    """
    found: dict[str, list[tuple[Path, Format]]] = {"text": [], "records": []}
    for path in listing.paths:
        format = format_of(path, origin)
        if format.kind in found:
            found[format.kind].append((path, format))
        else:
            listing.left_out[f"{format.name} files"] += 1
    text, records = found["text"], found["records"]
    if text and records:
        of_text, of_records = (f"{len(files)}, e.g. {files[0][0].name}" for files in found.values())
        suffixes = "".join(records[0][0].suffixes[-2 if records[0][1].compression else -1 :])
        pattern = literal_root(Path(str(place))) if glob.has_magic(str(place)) else place
        raise ConfigError(
            origin,
            place,
            f"holds files of text ({of_text}) and of records ({of_records}), mixed",
            f"name one kind: {pattern}/**/*{suffixes}",
        )
    listing.paths = [path for path, _ in text or records]
    return text or records


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
                elif is_saved_dataset(path):
                    listing.paths.append(path)
                    listing.links += entry.is_symlink()
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
    listing, root = Listing(), literal_root(pattern)
    shards = dict[Path, bool]()
    for name in glob.glob(str(pattern), recursive=True):
        path = Path(name)
        kind = special_kind(path)
        if kind != "directory" and _is_below_shards(path.parent, root, shards):
            listing.left_out["files of directories of shards"] += 1
        elif kind is None:
            listing.paths.append(path)
            listing.links += path.is_symlink()
        elif kind != "directory":
            listing.left_out[f"{kind}s"] += 1
        elif "**" not in pattern.parts:  # which enters directories
            listing.left_out["directories"] += 1
    listing.paths.sort(key=lambda path: path.parts)
    return listing


def holds_shards(directory: Path) -> bool:
    """Return whether a directory below a source, or one of several entries, holds shards.

    Also those of a preparation that is under way or was interrupted.
    """
    if is_unfinished(directory):
        return True
    try:
        with (directory / INDEX).open("rb") as file:
            return f'"{FORMAT}"'.encode() in file.read(200)
    except OSError:
        return False


def is_unfinished(directory: Path) -> bool:
    """Return whether a preparation of shards is under way in a directory, or was interrupted."""
    try:
        with (directory / PARTS / PLAN).open("rb") as file:
            return b'"shard_tokens"' in file.read(1 << 16)
    except OSError:
        return False


def _is_below_shards(directory: Path, root: Path, known: dict[Path, bool]) -> bool:
    """Return whether a directory from `root` on down to this one holds shards."""
    if directory not in known:
        above = directory != root and directory != directory.parent
        known[directory] = holds_shards(directory) or (
            above and _is_below_shards(directory.parent, root, known)
        )
    return known[directory]


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
