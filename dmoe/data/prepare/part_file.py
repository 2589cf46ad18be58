"""Encode a part and keep it in one file, which is complete once it has its name.

    8 bytes, the length of the header | header (JSON) | for each split: tokens |
    for each split: positions where a document begins (int64, relative to the part's tokens)

A document begins at the separator before it, so the first one of a part may begin at -1. Once its
tokens are in finished shards, a part is kept without them (`drop_tokens`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dmoe.data.packing import token_dtype
from dmoe.data.prepare.parts import Piece
from dmoe.data.tokenizers import Tokenizer, decode_utf8

_POSITION = np.dtype("<i8")


@dataclass
class PartSplit:
    """Share of one split in a part."""

    tokens: int = 0
    documents: int = 0
    """Documents that begin in this part."""
    text_bytes: int = 0
    runs: list[tuple[int, str]] = field(default_factory=list)
    """(position relative to the part, domain) where a domain begins."""


@dataclass(frozen=True)
class PartHeader:
    """All about a part but its tokens."""

    digest: str
    splits: tuple[PartSplit, PartSplit]
    num_nul: int = 0
    damaged: tuple[int, int, int] = (0, -1, -1)
    """Documents that are not UTF-8 or hold U+FFFD: count, first and last number."""
    has_tokens: bool = True


def encode_part(pieces: Sequence[Piece], number: int, digest: str, tokenizer: Tokenizer) -> bytes:
    """Return the content of a part file. Part 0 opens both streams with a separator."""
    dtype = token_dtype(tokenizer.vocab_size)
    opening = [np.array([tokenizer.separator], dtype=dtype)] if number == 0 else []
    chunks: tuple[list[np.ndarray], list[np.ndarray]] = ([*opening], [*opening])
    starts: tuple[list[int], list[int]] = ([], [])
    splits = (PartSplit(len(opening)), PartSplit(len(opening)))
    num_nul, damaged = 0, set[int]()
    for piece in pieces:
        split, chunk = splits[piece.split], chunks[piece.split]
        if piece.opens:
            starts[piece.split].append(split.tokens - 1)
            if not split.runs or split.runs[-1][1] != piece.domain:
                split.runs.append((split.tokens - 1, piece.domain))
        if piece.is_tokens:
            tokens = np.frombuffer(piece.data, dtype=dtype)
            split.text_bytes += int(tokenizer.token_bytes[tokens].sum())
        else:
            tokens = tokenizer.encode(piece.data).astype(dtype)
            split.text_bytes += len(piece.data)
            num_nul += piece.data.count(0)
            if tokenizer.name != "bytes" and "\ufffd" in decode_utf8(piece.data):
                damaged.add(piece.document)
        chunk.append(tokens)
        split.tokens += len(tokens)
        if piece.closes:
            chunk.append(np.array([tokenizer.separator], dtype=dtype))
            split.tokens += 1
    for split, found in zip(splits, starts, strict=True):
        split.documents = len(found)
    numbers = (len(damaged), min(damaged, default=-1), max(damaged, default=-1))
    header = PartHeader(digest, splits, num_nul, numbers)
    tokens_of_splits = [b"".join(part.tobytes() for part in chunk) for chunk in chunks]
    positions = [np.array(found, dtype=_POSITION).tobytes() for found in starts]
    return _join(header, [*tokens_of_splits, *positions])


def _join(header: PartHeader, arrays: list[bytes]) -> bytes:
    text = json.dumps(asdict(header)).encode()
    return b"".join([len(text).to_bytes(8, "little"), text, *arrays])


class PartFile:
    """A part file that is there: its header, and its arrays when they are asked for."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        """Read the header. Raises ValueError or OSError for no file, or one that is cut off."""
        self.path, self._dtype = path, dtype
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 2**32:
                raise ValueError("length of the header")
            self.header = _parse(json.loads(file.read(length)))
        self._offset = 8 + length
        size = self._offset + sum(
            split.tokens * dtype.itemsize * self.header.has_tokens
            + split.documents * _POSITION.itemsize
            for split in self.header.splits
        )
        if path.stat().st_size != size:
            raise ValueError("size")

    def tokens(self, split: int) -> np.ndarray:
        """Return the tokens of a split."""
        assert self.header.has_tokens
        first = self._offset
        if split == 1:
            first += self.header.splits[0].tokens * self._dtype.itemsize
        return self._read(first, self.header.splits[split].tokens, self._dtype)

    def starts(self, split: int) -> np.ndarray:
        """Return the positions where documents begin, relative to the part's tokens: int64 [N]."""
        first, splits = self._offset, self.header.splits
        if self.header.has_tokens:
            first += sum(part.tokens for part in splits) * self._dtype.itemsize
        if split == 1:
            first += splits[0].documents * _POSITION.itemsize
        return self._read(first, splits[split].documents, _POSITION)

    def drop_tokens(self) -> None:
        """Keep the part without its tokens, which are in finished shards."""
        if self.header.has_tokens:
            header = replace(self.header, has_tokens=False)
            write_file(self.path, _join(header, [self.starts(n).tobytes() for n in (0, 1)]))

    def _read(self, offset: int, count: int, dtype: np.dtype) -> np.ndarray:
        return np.fromfile(self.path, dtype=dtype, count=count, offset=offset)


def _parse(body: Any) -> PartHeader:
    """Return the header of a part; ValueError if it is not one."""
    try:
        splits = [
            PartSplit(
                int(split["tokens"]),
                int(split["documents"]),
                int(split["text_bytes"]),
                [(int(start), str(domain)) for start, domain in split["runs"]],
            )
            for split in body["splits"]
        ]
        count, first, last = body["damaged"]
        return PartHeader(
            str(body["digest"]),
            (splits[0], splits[1]),
            int(body["num_nul"]),
            (int(count), int(first), int(last)),
            bool(body["has_tokens"]),
        )
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"header ({error})") from error


def write_file(path: Path, data: bytes) -> None:
    """Write a file and give it its name when it is on disk; leave nothing half-written."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
