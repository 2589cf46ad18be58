"""`metrics.layers.bin`: what the lines of `metrics.jsonl` hold per MoE layer, beside that file.

A line has its numbers per layer, expert and rank there, and `layers_at: [offset, size]` in their
place. Only `metrics_log.py` uses this module.

The file is little-endian and append-only: the 8 bytes `dmoelay1`, then records of

    4 bytes  kind: b"SPEC" or b"DATA"
    uint32   length of the content in bytes
    uint32   CRC-32 of the content
    content

A SPEC is the structure of the layers as JSON; each process writes it again, before the first DATA
that has it. A DATA is the uint64 offset of its SPEC, and the columns: see `layer_columns.py`.

A record is written before the line that names it, so a process that is killed leaves at most bytes
that no line names: they stay, and change nothing. Void lines and their records stay likewise.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

from dmoe.runs.layer_columns import Path as ColumnPath
from dmoe.runs.layer_columns import Spec, column_lengths, decode, encode, join, split

MAGIC = b"dmoelay1"
HEAD = struct.Struct("<4sII")
SPEC_OFFSET = struct.Struct("<Q")


def layer_path(metrics: Path) -> Path:
    """Return the path of the layers of a metrics file: `metrics.layers.bin`."""
    return metrics.with_name(f"{metrics.stem}.layers.bin")


class LayerWriter:
    """Appends the layers of lines. The file is created with its first record."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        self._specs: dict[str, int] = {}
        """Offsets of the structures that this process has written."""

    def append(self, layers: list[Any], line_bytes: int) -> list[int]:
        """Append the layers of one line.

        Args:
            layers: plain JSON; null for missing numbers.
            line_bytes: limit of the record without one byte per number.

        Returns:
            Offset and size of the record. Raises OSError, e.g. on a full disk.
        """
        text, columns = split(layers)
        if self._file is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._file = os.open(self._path, flags, 0o644)
            if os.fstat(self._file).st_size == 0:
                self._write(MAGIC)
        if text not in self._specs:
            offset = self._append_record(b"SPEC", text.encode())[0]
            self._specs[text] = offset
        numbers = sum(map(len, columns.values()))
        content = encode(columns, line_bytes - HEAD.size - SPEC_OFFSET.size + numbers)
        return self._append_record(b"DATA", SPEC_OFFSET.pack(self._specs[text]) + content)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _append_record(self, kind: bytes, content: bytes) -> list[int]:
        assert self._file is not None
        offset = os.lseek(self._file, 0, os.SEEK_END)
        self._write(HEAD.pack(kind, len(content), zlib.crc32(content)) + content)
        return [offset, HEAD.size + len(content)]

    def _write(self, data: bytes) -> None:
        """Write all bytes: on a disk that is almost full, the kernel takes a part of them."""
        assert self._file is not None
        while data:
            data = data[os.write(self._file, data) :]


class LayerReader:
    """Reads the layers that lines name. Open while it is used; a missing file has no layers."""

    def __init__(self, path: Path) -> None:
        self._specs: dict[int, tuple[Spec, dict[ColumnPath, int]]] = {}
        try:
            self._file: int | None = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._file = None

    def __enter__(self) -> LayerReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)

    def read(self, place: Any) -> list[Any] | None:
        """Return the layers at `place`; None where they are missing, incomplete or damaged."""
        content = self._content(place, b"DATA")
        if content is None or len(content) < SPEC_OFFSET.size:
            return None
        (at,) = SPEC_OFFSET.unpack_from(content)
        try:
            if at not in self._specs:
                text = self._content([at, None], b"SPEC")
                if text is None:
                    return None
                spec = json.loads(text)
                self._specs[at] = spec, column_lengths(spec)
            spec, lengths = self._specs[at]
            return join(spec, decode(content[SPEC_OFFSET.size :], lengths))
        # the checksum holds, so another version wrote it
        except (ValueError, KeyError, AttributeError, TypeError):
            return None

    def _content(self, place: Any, kind: bytes) -> bytes | None:
        """Return the content of the record at [offset, size]; None unless it is intact."""
        if self._file is None or not isinstance(place, list) or len(place) != 2:
            return None
        offset, size = place
        if type(offset) is not int or not 0 <= offset < 1 << 62:
            return None
        head = os.pread(self._file, HEAD.size, offset)
        if len(head) < HEAD.size:
            return None
        found, length, checksum = HEAD.unpack(head)
        if found != kind or (size is not None and size != HEAD.size + length):
            return None
        content = os.pread(self._file, length, offset + HEAD.size)
        return content if zlib.crc32(content) == checksum else None
