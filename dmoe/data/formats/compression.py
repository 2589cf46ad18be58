"""Compressed files as streams of bytes: gzip, bzip2, xz, zstandard.

A file that ends in the middle, or is damaged, is an error that names it: a truncated download must
not train on half of its text. A file may have several members (frames) one after the other, as
`cat a.gz b.gz` gives.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dmoe.data.formats.errors import optional_library, unreadable

MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"(\xb5/\xfd": "zstandard",
}
"""First bytes of the compressed formats."""
SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstandard"}
_OPENERS: dict[str, Callable[[Path], Any]] = {
    "gzip": gzip.open,
    "bzip2": bz2.open,
    "xz": lzma.open,
}
_BLOCK = 1 << 17


def compression_of(head: bytes) -> str | None:
    """Return the name of the compressed format that a file begins with, or None."""
    return next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)


def inner_name(path: Path, compression: str | None) -> Path:
    """Return the path without the suffix of its compression: `a.jsonl.gz` holds `a.jsonl`."""
    if compression is not None and SUFFIXES.get(path.suffix.lower()) == compression:
        return path.with_suffix("")
    return path


@contextmanager
def open_stream(path: Path, compression: str | None, origin: str) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed.

    Args:
        path: of the file.
        compression: from `compression_of`; None reads the bytes as they are.
        origin: the config field that names the file.

    Raises:
        ConfigError: when it is opened, and inside the `with` block when it is read: no
            permission, a file that is truncated or damaged, a missing library.
    """
    truncated = unreadable(
        origin,
        path,
        f"is a {compression} file that ends too early",
        "it is truncated: download or write it again",
    )
    zstandard = None
    if compression == "zstandard":
        zstandard = optional_library("zstandard", origin, path, "a zstandard file")
    damaged = (
        gzip.BadGzipFile,
        zlib.error,
        lzma.LZMAError,
        *((zstandard.ZstdError,) if zstandard else ()),
    )
    try:
        with _open(path, compression, zstandard) as stream:
            yield stream
    except EOFError as error:
        raise truncated from error
    except damaged as error:
        raise _damaged(origin, path, compression, error) from error
    except OSError as error:
        if error.errno is None and compression is not None:  # how bz2 says that data are invalid
            raise _damaged(origin, path, compression, error) from error
        reason = f"must be readable, but {error.filename or path} is not ({error.strerror})"
        raise unreadable(origin, path, reason, "check the file") from error


def _damaged(origin: str, path: Path, compression: str | None, error: Exception) -> Exception:
    reason = f"is a damaged {compression} file ({error})"
    return unreadable(origin, path, reason, "download or write it again")


def _open(path: Path, compression: str | None, zstandard: Any) -> Any:
    if compression is None:
        return path.open("rb")
    if zstandard is not None:
        return io.BufferedReader(_ZstandardFile(path, zstandard), _BLOCK)
    return _OPENERS[compression](path)


class _ZstandardFile(io.RawIOBase):
    """Frames one after the other. zstandard's own reader gives a truncated file without a word."""

    def __init__(self, path: Path, zstandard: Any) -> None:
        self._decompressor = zstandard.ZstdDecompressor()
        self._file = path.open("rb")
        self._frame: Any = None
        self._compressed, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._compressed:
                self._compressed = self._file.read(_BLOCK)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(self._compressed))
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
