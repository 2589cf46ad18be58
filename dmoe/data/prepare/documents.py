"""Documents as they are prepared: content that is read in blocks, so that no size is too large.

A document is text, or tokens of the run's tokenizer that somebody has made before (files of
nanoGPT and Megatron). Tokens are treated as their bytes in the stored type: hashed, cut and counted
as such.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from dmoe.config.errors import ConfigError

BLOCK = 1 << 20
"""Bytes of a file that are read together."""
SMALL = 4 << 20
"""Files up to this size are read whole, once; of larger ones, only a block is in memory."""
_SALT = b"dmoe holdout\0"


class Content(Protocol):
    """Bytes of one document."""

    @property
    def size(self) -> int:
        """Number of bytes."""

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to `stop`, in blocks."""


@dataclass(frozen=True)
class MemoryContent:
    """Content that is in memory."""

    data: bytes

    @property
    def size(self) -> int:
        """Number of bytes."""
        return len(self.data)

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to `stop`, in blocks."""
        for first in range(start, stop, BLOCK):
            yield self.data[first : min(first + BLOCK, stop)]


@dataclass(frozen=True)
class FileContent:
    """Content of a whole file, read again each time it is needed."""

    path: Path
    size: int
    modified_ns: int
    """When it was last written. Its text is hashed first and encoded later."""

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to `stop`. Raises ConfigError if the file has changed."""
        try:
            with self.path.open("rb") as file:
                self._check(file.fileno())
                file.seek(start)
                while start < stop:
                    if not (block := file.read(min(BLOCK, stop - start))):
                        break
                    start += len(block)
                    yield block
                self._check(file.fileno())
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror})") from error
        if start < stop:
            raise self._error("became shorter while it was read")

    def _check(self, descriptor: int) -> None:
        now = os.fstat(descriptor)
        if (now.st_size, now.st_mtime_ns) != (self.size, self.modified_ns):
            raise self._error("has changed while it was read")

    def _error(self, reason: str) -> ConfigError:
        return ConfigError("data.source", self.path, reason, "check the file, and start again")


@dataclass(frozen=True, eq=False)
class TokenContent:
    """Tokens of a file, memory-mapped, as bytes of the stored type.

    Args:
        token_N: integers of any type, at any byte order.
        dtype: the stored type.
        vocab_size: of the tokenizer; larger tokens are refused.
        place: of the document, for messages.
    """

    token_N: np.ndarray
    dtype: np.dtype
    vocab_size: int
    place: str

    @property
    def size(self) -> int:
        """Number of bytes in the stored type."""
        return len(self.token_N) * self.dtype.itemsize

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to `stop`, which are whole tokens."""
        width = self.dtype.itemsize
        assert start % width == stop % width == 0
        step = BLOCK // width
        for first in range(start // width, stop // width, step):
            part = self.token_N[first : min(first + step, stop // width)]
            if part.min() < 0 or part.max() >= self.vocab_size:
                wrong = part[(part < 0) | (part >= self.vocab_size)][0]
                raise ConfigError(
                    "data.source",
                    self.place,
                    f"holds the token {wrong}, and data.tokenizer has {self.vocab_size:,}",
                    "name the tokenizer that made the file",
                )
            yield part.astype(self.dtype).tobytes()


@dataclass(frozen=True)
class SourceDocument:
    """One document of a source, before it is known whether it is kept."""

    content: Content
    name: str
    domain: str
    group_key: bytes = b""
    """Shared by documents with the same meaning (corpus.py); empty: by none."""

    @property
    def is_tokens(self) -> bool:
        """Whether the content is tokens, which are not encoded again."""
        return isinstance(self.content, TokenContent)


@dataclass(frozen=True)
class Digests:
    """Hashes of one document, from one pass over its content."""

    content: bytes
    """SHA-256 of the content."""
    key: bytes
    """SHA-256 of the split key: of the group key, else the content."""
    fraction: float
    """Hash of the split key in [0, 1), as `splits.holdout_hash`."""


def digest(document: SourceDocument) -> Digests:
    """Hash a document block by block."""
    whole, split = hashlib.sha256(), hashlib.sha256(_SALT)
    for block in document.content.read(0, document.content.size):
        whole.update(block)
        if not document.group_key:
            split.update(block)
    split.update(document.group_key)
    content, group = whole.digest(), document.group_key
    key = hashlib.sha256(group).digest() if group else content
    return Digests(content, key, int.from_bytes(split.digest()[:8], "big") / 2**64)


class DigestSet:
    """A set of SHA-256 digests, their first 16 bytes each, in one array: open addressing.

    Memory: 16 bytes per place, of which half to three quarters are used: 21 to 32 bytes per
    document (while it grows, the old array too). Two of 10^9 different documents share 16 bytes
    with a probability of 10^-21.
    """

    def __init__(self) -> None:
        """Make an empty set."""
        self._places, self._count = 1024, 0
        self._table = bytearray(16 * self._places)

    def __len__(self) -> int:
        return self._count

    def add(self, digest: bytes) -> bool:
        """Add a digest; return whether it is new."""
        if self._count * 4 >= self._places * 3:
            self._grow()
        key = digest[:16]
        offset = self._find(key)
        if self._table[offset : offset + 16] == key:
            return False
        self._table[offset : offset + 16] = key
        self._count += 1
        return True

    def __contains__(self, digest: bytes) -> bool:
        offset = self._find(digest[:16])
        return self._table[offset : offset + 16] == digest[:16]

    def _find(self, key: bytes) -> int:
        """Return the offset of a key, or of the free place where it belongs."""
        table, free = self._table, bytes(16)
        place = int.from_bytes(key[:8], "little") % self._places
        while (found := table[16 * place : 16 * place + 16]) != key and found != free:
            place = (place + 1) % self._places
        return 16 * place

    def _grow(self) -> None:
        old = self._table
        self._places += self._places // 2
        self._table = bytearray(16 * self._places)
        free = bytes(16)
        for offset in range(0, len(old), 16):
            if (key := old[offset : offset + 16]) != free:
                place = self._find(bytes(key))
                self._table[place : place + 16] = key
