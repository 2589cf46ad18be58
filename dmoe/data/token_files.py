"""Files of tokens that other programs have written: nanoGPT's and Megatron's.

nanoGPT: `NAME.bin` is one stream of little-endian uint16, with the tokenizer's end-of-text token
after each document. Nothing in it says which tokenizer made it, so `data.tokenizer` is believed.

Megatron (`MMapIndexedDataset`, also of NeMo and GPT-NeoX): `NAME.bin` holds sequences of tokens one
after the other, and `NAME.idx`, little-endian,

    "MMIDIDX\\0\\0" | version 1: uint64 | type of a token: uint8 | sequences n: uint64
    | documents + 1: uint64 | length of each sequence: int32 [n] | its first byte: int64 [n]
    | first sequence of each document, and n: int64 [documents + 1]

Both are memory-mapped, never copied. A file that is truncated, or does not agree with its index, is
refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from dmoe.config.errors import ConfigError

_MAGIC = b"MMIDIDX\0\0"
_HEADER = len(_MAGIC) + 8 + 1 + 8 + 8
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Integer types by Megatron's code; 6 and 7 are floats."""
_OTHER_HEADERS = {20240520: "llm.c", 20240801: "llm.c", 278895051: "llm.c"}
_SCAN = 1 << 22
"""Tokens that are searched for separators together."""
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 14


@dataclass(frozen=True, eq=False)
class TokenFile:
    """A mapped file of tokens."""

    path: Path
    kind: str
    """nanoGPT or Megatron."""
    token_N: np.ndarray
    start_N: np.ndarray | None
    """Position of the first token of each document; None where no index tells."""

    def documents(self, separator: int) -> Iterator[tuple[int, int]]:
        """Yield the first position and the end of each document, without separators at its ends.

        Without an index, documents are what lies between separators. Reads the file.
        """
        if self.start_N is None:
            yield from self._between(separator)
            return
        ends = np.append(self.start_N[1:], len(self.token_N))
        for start, end in zip(self.start_N.tolist(), ends.tolist(), strict=True):
            while start < end and self.token_N[end - 1] == separator:
                end -= 1
            while start < end and self.token_N[start] == separator:
                start += 1
            if start < end:
                yield start, end

    def fingerprint(self) -> str:
        """Hash the size, the index and 64 samples of the file: not every byte, as that is slow."""
        data = self.token_N.view(np.uint8)
        digest = hashlib.sha256(f"{self.kind} {len(data)} ".encode())
        for number in range(_SAMPLES):
            start = (len(data) - 1) * number // (_SAMPLES - 1)
            start = min(start, max(0, len(data) - _SAMPLE_BYTES))
            digest.update(data[start : start + _SAMPLE_BYTES].tobytes())
        if self.start_N is not None:
            digest.update(np.ascontiguousarray(self.start_N).data)
        return digest.hexdigest()

    def _between(self, separator: int) -> Iterator[tuple[int, int]]:
        start = 0
        for first in range(0, len(self.token_N), _SCAN):
            found = np.flatnonzero(self.token_N[first : first + _SCAN] == separator) + first
            for end in found.tolist():
                if start < end:
                    yield start, end
                start = end + 1
        if start < len(self.token_N):
            yield start, len(self.token_N)


def is_token_file(source: str) -> bool:
    """Return whether a source is one file of tokens."""
    path = Path(source).expanduser()
    return path.suffix.lower() in (".bin", ".idx") and path.is_file()


def open_token_file(path: Path, field: str = "data.source") -> TokenFile:
    """Map a file of tokens, `NAME.bin` or `NAME.idx`.

    Args:
        path: with an index beside it the file is Megatron's, else nanoGPT's.
        field: the config field that names it.

    Raises:
        ConfigError: the file is truncated, of another format, or does not agree with its index.

    Cost: reads the index; of the tokens only what shows another format.
    """
    path = path.expanduser()
    data, index = path.with_suffix(".bin"), path.with_suffix(".idx")
    try:
        if index.is_file():
            return _open_megatron(data, index, field)
        return _open_nanogpt(data, field)
    except OSError as error:
        name = error.filename or data
        raise _refused(field, name, f"cannot be read ({error.strerror})", "check it") from error


def _open_nanogpt(path: Path, field: str) -> TokenFile:
    size = path.stat().st_size
    if size == 0 or size % 2:
        reason = f"has {size} bytes, and nanoGPT's tokens have 2 each"
        raise _refused(field, path, reason, "it is truncated: write it again")
    if size >= 4:
        found = int(np.fromfile(path, "<i4", 1)[0])
        if found in _OTHER_HEADERS:
            reason = f"begins with the header of {_OTHER_HEADERS[found]}, not with tokens"
            raise _refused(field, path, reason, "write it without the first 1,024 bytes")
    return TokenFile(path, "nanoGPT", np.memmap(path, dtype="<u2", mode="r"), None)


def _open_megatron(path: Path, index: Path, field: str) -> TokenFile:
    def refuse(reason: str) -> NoReturn:
        raise _refused(field, index, reason, "write both files again")

    size = index.stat().st_size
    with index.open("rb") as file:
        head = file.read(_HEADER)
    if not head.startswith(_MAGIC):
        refuse("does not begin as an index of Megatron (MMIDIDX)")
    if len(head) < _HEADER:
        refuse(f"is truncated: it has {size} bytes")
    rest = head[len(_MAGIC) :]
    version, code = int.from_bytes(rest[:8], "little"), rest[8]
    sequences, boundaries = (int.from_bytes(rest[n : n + 8], "little") for n in (9, 17))
    if version != 1:
        refuse(f"must be of version 1, but is {version}")
    if code not in _DTYPES:
        refuse(f"has tokens of type {code}, which are no integers")
    needed = _HEADER + 12 * sequences + 8 * boundaries
    if size != needed:
        refuse(
            f"has {size} bytes, and an index of {sequences} sequences and {boundaries} "
            f"document boundaries has {needed}: it is truncated, or of a multimodal dataset"
        )
    if not sequences or not path.is_file():
        refuse(f"names no tokens: {path.name} is missing" if sequences else "has no sequences")
    length_N = np.memmap(index, "<i4", "r", _HEADER, (sequences,))
    pointer_N = np.memmap(index, "<i8", "r", _HEADER + 4 * sequences, (sequences,))
    first_D = np.memmap(index, "<i8", "r", _HEADER + 12 * sequences, (boundaries,))
    dtype = np.dtype(_DTYPES[code])
    if length_N.min() < 0:
        refuse("has a sequence of negative length")
    end_N = np.cumsum(length_N, dtype=np.int64) * dtype.itemsize
    if pointer_N[0] != 0 or not np.array_equal(pointer_N[1:], end_N[:-1]):
        refuse("has sequences that do not lie one after the other")
    if (found := path.stat().st_size) != end_N[-1]:
        reason = f"has {found} bytes, and {index.name} describes {end_N[-1]}"
        raise _refused(field, path, reason, "write both files again")
    in_order = boundaries and first_D[0] == 0 and first_D[-1] == sequences
    if not in_order or (first_D[1:] < first_D[:-1]).any():
        refuse("has document boundaries that do not ascend from 0 to the number of sequences")
    if end_N[-1] == 0:
        refuse("has no tokens")
    start_N = np.append(0, end_N)[np.asarray(first_D[:-1])] // dtype.itemsize
    # A document without tokens begins where the next one does.
    start_N = np.unique(start_N[start_N < end_N[-1] // dtype.itemsize])
    return TokenFile(path, "Megatron", np.memmap(path, dtype=dtype, mode="r"), start_N)


def _refused(field: str, path: object, reason: str, fix: str) -> ConfigError:
    return ConfigError(field, path, reason, fix)
