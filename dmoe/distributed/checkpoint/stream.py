"""A safetensors file, written tensor by tensor.

    8 bytes: length of the header | header, JSON, padded with spaces to a multiple of 8 | the tensors' bytes, without gaps

`safetensors.torch.save` builds the whole file in memory and holds Python's lock meanwhile: 1.2 s of standstill per 400 MB, for the
training thread too while another one writes (version 0.8, measured). Here the lock is free while the disk is busy, and beyond the
state one tensor is in memory, of those on an accelerator. What is written is read back by the library itself: `shards.py`
demands that of every file before a checkpoint exists.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from dmoe.distributed.checkpoint.state import DTYPES

__all__ = ["Piece", "write_file"]

_NAMES = {getattr(torch, torch_name): name for name, torch_name in DTYPES.items()}
_SLICE = 64 << 20  # bytes handed to the system at a time: it writes at most 2 GiB in one call


@dataclass(frozen=True)
class Piece:
    """What the header says of one tensor, and how to get at its numbers when their turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def size(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, pieces: Iterable[Piece], metadata: Mapping[str, str]) -> None:
    """Write and fsync a new file; `read` of each piece is called once, in the order of the file.

    Errors: OSError (disk full, the file exists); what `read` raises. A file cut short is left where it is.
    """
    ordered = sorted(pieces, key=lambda piece: (-piece.dtype.itemsize, piece.name))  # wide types first: all stay aligned
    with open(path, "xb", buffering=0) as file:
        _write(file, memoryview(_header(ordered, metadata)))
        for piece in ordered:
            tensor = piece.read().detach().cpu().contiguous()
            assert (tensor.dtype, tuple(tensor.shape)) == (piece.dtype, piece.shape), (
                f"{piece.name!r} is not what was announced"
            )
            if piece.size:
                _write(file, tensor.reshape(-1).view(torch.uint8).numpy().data)
        os.fsync(file.fileno())


def _header(ordered: list[Piece], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for piece in ordered:
        start, end = end, end + piece.size
        entries[piece.name] = {"dtype": _NAMES[piece.dtype], "shape": list(piece.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(file: io.FileIO, data: memoryview) -> None:
    """All of it: one call may write less than it was given."""
    while data:
        data = data[file.write(data[:_SLICE]) :]
