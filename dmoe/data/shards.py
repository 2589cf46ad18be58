"""Shards: a corpus tokenized once, stored on disk and memory-mapped.

A shard directory holds raw little-endian token files and index.json (see shard_index.py). The
shards of a split form one token stream: a sequence may continue in the next shard, so the shard
size changes no sequence, and training from shards reads exactly what training from the same text
reads. They are written by prepare/; index.json is written last and renamed into place, so a
directory with one is complete.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from dmoe.data.shard_index import ShardIndex, damaged_error, read_index

_BLOCK_BYTES = 2**22
"""Bytes per read when a file is hashed."""
_POSITION = np.dtype("<i8")


def map_shards(directory: Path, index: ShardIndex, split: str) -> list[np.ndarray]:
    """Return the shards of a split as read-only memory maps, in order.

    Raises ConfigError on data.source for a missing, linked or wrong-sized file. Contents are not
    read here; `verify_shards` does that.
    """
    return [
        np.memmap(_checked_file(directory, shard.file, shard.bytes), dtype=index.dtype, mode="r")
        for shard in index.splits[split].shards
    ]


def map_documents(directory: Path, index: ShardIndex, split: str) -> np.ndarray | None:
    """Return where the documents of a split begin: int64 [N], a read-only memory map.

    Position 0 is that of the first document; each is that of the separator before it. None for
    shards of an older version, which do not say. Raises ConfigError as `map_shards`.
    """
    found = index.splits[split].boundaries
    if found is None:
        return None
    size = found.documents * _POSITION.itemsize
    return np.memmap(_checked_file(directory, found.file, size), dtype=_POSITION, mode="r")


def verify_shards(directory: Path) -> ShardIndex:
    """Read every byte and compare all hashes with the index.

    Raises ConfigError on data.source that names the first file that differs.
    """
    index = read_index(directory)
    for split in index.splits.values():
        split_digest = hashlib.sha256()
        for shard in split.shards:
            path = _checked_file(directory, shard.file, shard.bytes)
            _verify(path, shard.sha256, split_digest)
        if split_digest.hexdigest() != split.sha256:
            raise damaged_error(
                directory, "a split is not what was written (SHA-256 of its stream)"
            )
        if found := split.boundaries:
            path = _checked_file(directory, found.file, found.documents * _POSITION.itemsize)
            _verify(path, found.sha256)
    return index


def _verify(path: Path, expected: str, *more: hashlib._Hash) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            for each in (digest, *more):
                each.update(block)
    if digest.hexdigest() != expected:
        raise damaged_error(path.parent, f"the content of {path.name} has changed (SHA-256)")


def _checked_file(directory: Path, name: str, size: int) -> Path:
    path = directory / name
    if path.is_symlink() or not path.is_file():
        raise damaged_error(directory, f"{name} is missing or not a plain file")
    if (found := path.stat().st_size) != size:
        raise damaged_error(directory, f"{name} has {found} bytes instead of {size}")
    return path
