"""A published model's directory: its safetensors files, one tensor at a time, and its other files.

Only names, dtypes and shapes are read at first. Nothing here knows a model class, so that an
exported directory can be checked without the code that wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmoe.checkpoint.dcp import Chunk, write_safetensors
from dmoe.checkpoint.validate import DTYPES
from dmoe.config.errors import CheckpointError, ConfigError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
"""Endings of files that hold weights; every other file of a source belongs to the model too."""
SCALES = ("_scale_inv", "_scale", "_scales")
"""Endings of the names of a quantized model's scales."""
BLOCKS = "_blocks"
"""Ending of the names of MXFP4 codes; the weights that they stand for are called without it."""
MAX_SHARD_BYTES = 4 << 30
TORCH_DTYPES = {name: getattr(torch, torch_name) for name, torch_name in DTYPES.items()}


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of a file."""

    file: Path
    dtype: str
    """safetensors' name, e.g. BF16."""
    shape: tuple[int, ...]


class PublishedDirectory:
    """Reads a directory of safetensors files with a `config.json`.

    Attributes:
        folder: the directory.
        config: content of `config.json`.
        tensors: file, dtype and shape of every tensor, by name.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read the headers.

        Raises:
            CheckpointError: a file is missing or damaged, or a tensor is in two files or in none.
        """
        self.folder = Path(folder)
        self.config: dict[str, Any] = read_json(self.folder / "config.json")
        self.tensors: dict[str, TensorFacts] = {}
        index = self.folder / INDEX
        files = {self.folder / SINGLE}
        wanted: dict[str, str] = {}
        if index.is_file() and not (self.folder / SINGLE).is_file():  # as transformers does
            wanted = _weight_map(index)
            files = {self.folder / name for name in wanted.values()}
        for file in sorted(files):
            for name, facts in _headers(file).items():
                if name in self.tensors:
                    raise CheckpointError(f"{self.folder}: {name!r} is in two files")
                self.tensors[name] = facts
        if wanted and (wrong := sorted(wanted.keys() ^ self.tensors.keys())):
            raise CheckpointError(f"{index}: {wrong[0]!r} is only in the index or only in a file")

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        with safe_open(str(self.tensors[name].file), framework="pt") as opened:
            value: Tensor = opened.get_tensor(name)
            return value

    @property
    def quantized(self) -> bool:
        """Whether `config.json` names a quantization."""
        return "quantization_config" in self.config

    def other_files(self) -> list[Path]:
        """Return every file that holds no weights: tokenizer, chat template, generation config."""
        return sorted(
            path
            for path in self.folder.rglob("*")
            if path.is_file()
            and path.suffix not in WEIGHTS
            and not path.name.endswith(".index.json")
            and not any(part.startswith(".") for part in path.relative_to(self.folder).parts)
        )


def _headers(file: Path) -> dict[str, TensorFacts]:
    found = {}
    try:
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                part = opened.get_slice(name)
                found[name] = TensorFacts(file, part.get_dtype(), tuple(part.get_shape()))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from None
    return found


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{index}: has no weight_map")
    for name, file in found.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index}: gives {name!r} a file {file!r} that is none beside it")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file. Raises CheckpointError: it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return content


class ShardWriter:
    """Writes tensors to numbered safetensors files of at most `max_bytes` each.

    Memory: one file. A tensor larger than that is a file of its own.
    """

    def __init__(self, folder: Path, prefix: str = "", max_bytes: int = MAX_SHARD_BYTES) -> None:
        """Start without a file. `prefix`: of the provisional names, different on each rank."""
        if max_bytes < 1:
            raise ConfigError("max_shard_bytes", max_bytes, "must be 1 or more", "use 4 << 30")
        self.folder, self.prefix, self.max_bytes = folder, prefix, max_bytes
        self.count = 0
        """Files written so far."""
        self._waiting: dict[str, Tensor] = {}
        self._bytes = 0

    def add(self, name: str, value: Tensor) -> None:
        """Take one tensor; writes a file if it would become too large."""
        size = value.numel() * value.element_size()
        if self._waiting and self._bytes + size > self.max_bytes:
            self.flush()
        self._waiting[name] = value
        self._bytes += size

    def flush(self) -> None:
        """Write what waits as one file."""
        if not self._waiting:
            return
        chunks = [
            Chunk(name, value.dtype, tuple(value.shape), value.detach)
            for name, value in self._waiting.items()
        ]
        path = self.folder / f"part-{self.prefix}{self.count:05d}.safetensors"
        write_safetensors(path, chunks, {"format": "pt"})
        self.count += 1
        self._waiting, self._bytes = {}, 0


def tensors_of_parts(folder: Path) -> dict[str, list[str]]:
    """Return the names of the tensors of each file that `ShardWriter`s have written, in order."""
    return {path.name: sorted(_headers(path)) for path in sorted(folder.glob("part-*.safetensors"))}


def finish_shards(folder: Path, parts: Mapping[str, list[str]]) -> None:
    """Give files their final names and write the index, or no index for a single file.

    Args:
        folder: holds the files.
        parts: the names of the tensors of each file, by its provisional name.
    """
    weight_map: dict[str, str] = {}
    total_bytes = sum(size_of(_headers(folder / part).values()) for part in parts)
    for number, (part, names) in enumerate(parts.items(), 1):
        final = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        if len(parts) == 1:
            final = SINGLE
        (folder / part).rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    if len(parts) > 1:
        content = {
            "metadata": {"total_size": total_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def size_of(facts: Iterable[TensorFacts]) -> int:
    """Return the bytes of tensors."""
    total = 0
    for one in facts:
        elements = torch.Size(one.shape).numel()
        total += elements * TORCH_DTYPES[one.dtype].itemsize
    return total
