"""Single tensors of a checkpoint, in full, without a model, ranks or an optimizer.

A checkpoint's files hold slices of tensors (`dcp.py`). Here a tensor is put together from its
slices when it is asked for, so that memory is that of one tensor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dmoe.checkpoint.manifest import TensorEntry
from dmoe.checkpoint.manifest import verify as verify_manifest
from dmoe.config.errors import CheckpointError


@dataclass(frozen=True)
class _Slice:
    file: Path
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class TensorReader:
    """Reads tensors of one checkpoint by name.

    Attributes:
        tensors: shape and dtype of every tensor, by name.
        extra: what the writer has recorded: config, mesh, data position, versions.
    """

    def __init__(self, directory: Path) -> None:
        """Hash all files and read their headers.

        Raises:
            CheckpointError: the checkpoint is damaged.
        """
        manifest = verify_manifest(directory)
        self.directory, self.step = directory, manifest.step
        self.tensors: dict[str, TensorEntry] = dict(manifest.tensors)
        self.extra = manifest.extra
        self._slices: dict[str, list[_Slice]] = {}
        for name in manifest.files:
            if name.endswith(".safetensors"):
                self._read_header(directory / name)

    def _read_header(self, file: Path) -> None:
        with safe_open(str(file), framework="pt") as opened:
            offsets = json.loads((opened.metadata() or {})["DCP_SHARDING_INFO"])
            for name in opened.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                shape = tuple(opened.get_slice(name).get_shape())
                offset = tuple(offsets[name]["saved_offsets"])
                self._slices.setdefault(name, []).append(_Slice(file, offset, shape))

    def read(self, name: str) -> Tensor:
        """Return a tensor in full, on the CPU.

        Raises:
            CheckpointError: the files do not hold all of it.
        """
        entry = self.tensors[name]
        found = {part.offset: part for part in self._slices.get(name, ())}
        if sum(prod(part.shape) for part in found.values()) != prod(entry.shape):
            raise CheckpointError(f"{self.directory}: the files do not hold all of {name!r}")
        full = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        for part in found.values():
            with safe_open(str(part.file), framework="pt") as opened:
                value = opened.get_tensor(name)
            place = tuple(
                slice(start, start + size)
                for start, size in zip(part.offset, part.shape, strict=True)
            )
            full[place] = value
        return full
