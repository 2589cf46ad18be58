"""One file of choices: a safetensors file with one tensor, `experts` [tokens, layers, K].

A trace of choices (`tracking.trace`) has a second one, `scores` [tokens, layers, K] in float32,
with `sha256_scores`; a trace of scores has those of all experts, [tokens, layers, E], -1 of padding
tokens, and `"scores": "all"` in its header. A trace of counts has `counts` [samples, layers, E] in
their place.

That is the layout in which inference engines return the experts of a rollout, so a part can be
read by any of them, and theirs by dmoe. Ids are the smallest unsigned type that holds them, and
its largest value marks a choice that a token did not make (`moe.router.kind=adaptive`). A run's
part has in its header

    spec        the model and data the choices belong to (`ChoiceSpec`)
    first_step, steps    of the run, counted from 0
    batch       SHA-256 of the input tokens of the first step
    sha256      of the ids

and its token n is position n mod S of sample n // S mod B of step first_step + n // (S B): the
place in the training data, whatever rank computed it. Nothing of world, expert parallelism, time or
directory is in a file, so equal choices are equal bytes.

Letters: N tokens, L MoE layers, K experts per token, B samples of a step, S positions per sample.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dmoe.config.errors import ConfigError

FORMAT = "dmoe-choices-1"
TENSOR, SCORES = "experts", "scores"
NONE = -1
"""A choice that a token did not make, in arrays of signed integers."""
DTYPES = {
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "U64": np.uint64,
    "F32": np.float32,
}
"""Types of safetensors, little-endian."""
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
MAX_HEADER = 1 << 24


@dataclass(frozen=True)
class ChoiceSpec:
    """What choices belong to; another value of any field gives tokens or experts other meanings."""

    data: str
    """Fingerprint of the data."""
    seed: int
    """Seed of the order of the sequences."""
    global_batch: int
    """B."""
    seq_len: int
    """S."""
    layers: int
    """L."""
    experts: int
    """E, zero-cost ones included."""
    top_k: int
    """K."""

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.seq_len

    def count(self, expert_NLK: np.ndarray) -> np.ndarray:
        """Count the choices of each expert by sample, [samples, L, E]: at most S of one expert."""
        samples = len(expert_NLK) // self.seq_len
        shape = (samples, self.layers, self.experts)
        row_NL = np.arange(samples).repeat(self.seq_len)[:, None] * self.layers
        row_NL = row_NL + np.arange(self.layers)
        made_NLK = expert_NLK != NONE
        index = (row_NL[:, :, None] * self.experts + expert_NLK)[made_NLK]
        counted = np.bincount(index, minlength=samples * self.layers * self.experts)
        return counted.reshape(shape).astype(np.uint16 if self.seq_len < 1 << 16 else np.uint32)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the ids: one more value than experts, for a choice that is not made."""
        unsigned = (np.uint8, np.uint16, np.uint32)
        return np.dtype(next(dtype for dtype in unsigned if self.experts <= _top(dtype)))

    def pack(self, expert_NLK: np.ndarray) -> np.ndarray:
        """Return signed ids, `NONE` where none is selected, in the type of the files."""
        top = _top(self.dtype)
        return np.where(expert_NLK == NONE, top, expert_NLK).astype(self.dtype)


@dataclass(frozen=True)
class Part:
    """A file of choices, mapped into memory."""

    path: Path
    experts: np.ndarray
    """[N, L, K] as in the file."""
    header: Mapping[str, str]
    """Its text values; empty for a file that dmoe did not write."""
    scores: np.ndarray | None = None
    """[N, L, K]: the router's scores of the choices, in a trace; of scores: [N, L, E], of all."""

    @property
    def first_step(self) -> int:
        return int(self.header["first_step"])

    @property
    def end_step(self) -> int:
        """The step after the last one."""
        return self.first_step + int(self.header["steps"])

    @property
    def spec(self) -> ChoiceSpec:
        return ChoiceSpec(**json.loads(self.header["spec"]))

    @property
    def kind(self) -> dict[str, str]:
        """Return how the header describes the tensors: empty for a trace of choices."""
        return {name: self.header[name] for name in ("rows", "scores") if name in self.header}

    @property
    def is_whole(self) -> bool:
        """Whether ids and scores have the SHA-256 of the header."""
        found = {"sha256": self.experts, "sha256_scores": self.scores}
        return all(
            hashlib.sha256(array.data).hexdigest() == self.header.get(name)
            for name, array in found.items()
            if array is not None
        )


def signed(expert_NLK: np.ndarray) -> np.ndarray:
    """Return ids as int64, `NONE` for the largest value of an unsigned type."""
    ids = expert_NLK.astype(np.int64)
    if expert_NLK.dtype.kind == "u":
        ids[expert_NLK == _top(expert_NLK.dtype)] = NONE
    return ids


def read_choices(path: str | Path) -> np.ndarray:
    """Return the ids of a .npy or .safetensors file, int64 [tokens, layers, K], -1 for none.

    Raises:
        ConfigError: it is no such file.
    """
    return signed(open_part(Path(path)).experts)


def write_choices(
    path: str | Path,
    expert_NLK: np.ndarray,
    header: Mapping[str, str] | None = None,
    score_NLK: np.ndarray | None = None,
) -> None:
    """Write ids [tokens, layers, K] as safetensors: whole, or not at all.

    Args:
        path: of the file.
        expert_NLK: any integers; they are written as they are.
        header: text values; the SHA-256 of the ids is added.
        score_NLK: float32, of a trace; [tokens, layers, E] of a trace of scores.

    Raises:
        ConfigError: no integers [tokens, layers, K]; nothing is written.
    """
    ids, path = np.asarray(expert_NLK), Path(path)
    _check_layout(ids, "expert_NLK", path)
    ids = np.ascontiguousarray(ids.astype(ids.dtype.newbyteorder("<"), copy=False))
    arrays, metadata = {TENSOR: ids}, {**(header or {}), "format": FORMAT}
    metadata["sha256"] = hashlib.sha256(ids.data).hexdigest()
    if metadata.get("rows") == "sample":
        arrays = {"counts": ids}
    if score_NLK is not None:
        arrays[SCORES] = scores = np.ascontiguousarray(score_NLK, np.float32)
        metadata["sha256_scores"] = hashlib.sha256(scores.data).hexdigest()
    content: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        content[name] = {
            "dtype": NAMES[array.dtype],
            "shape": array.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(content, sort_keys=True)
    encoded = text.encode()
    encoded += b" " * (-len(encoded) % 8)
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for array in arrays.values():
            file.write(array.data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def part_header(spec: ChoiceSpec, first_step: int, steps: int, batch: str) -> dict[str, str]:
    """Return the header of a part of a run; `batch` is the digest of its first step's tokens."""
    return {
        "spec": json.dumps(asdict(spec), sort_keys=True),
        "first_step": str(first_step),
        "steps": str(steps),
        "batch": batch,
    }


def open_part(path: Path, field: str = "moe.replay.from") -> Part:
    """Map a file of choices into memory; `field` is what errors name.

    Raises:
        ConfigError: it cannot be read, or holds no integers [tokens, layers, K].
    """
    try:
        arrays, header = _map_npy(path) if path.suffix == ".npy" else _map_safetensors(path)
        part = Part(path, arrays[0], header, arrays[1] if len(arrays) > 1 else None)
        if "spec" in header:  # a damaged header is found here
            _ = part.spec, part.end_step
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        allowed = f"cannot be read as choices ({reason or type(error).__name__})"
        fix = "give a directory that moe.replay.record has written, a .npy or a .safetensors file"
        raise ConfigError(field, path, allowed, fix) from None
    _check_layout(part.experts, field, path)
    return part


def _check_layout(ids: np.ndarray, field: str, path: Path) -> None:
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        allowed = f"holds {ids.dtype}{list(ids.shape)}, not integers [tokens, layers, K]"
        raise ConfigError(field, path, allowed, "write expert ids in that layout")


def _map_npy(path: Path) -> tuple[list[np.ndarray], dict[str, str]]:
    found = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(found, np.ndarray):
        raise ValueError("it is an archive of arrays, .npz")
    return [found], {}


def _map_safetensors(path: Path) -> tuple[list[np.ndarray], dict[str, str]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ValueError("it is no safetensors file, or cut off")
        content = json.loads(file.read(length))
    header = content.pop("__metadata__", {})
    name = TENSOR if TENSOR in content else next(iter(content), "")
    if name != TENSOR and len(content) != 1:
        raise ValueError(f"it holds {len(content)} tensors, none of them called {TENSOR}")
    names = [name, SCORES] if name == TENSOR and SCORES in content else [name]
    return [_map_tensor(path, content[each], each, 8 + length, size) for each in names], header


def _map_tensor(
    path: Path, entry: Mapping[str, Any], name: str, first: int, size: int
) -> np.ndarray:
    """Map one tensor; `first` is where the data begin, `size` that of the file."""
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} is {entry['dtype']}, not integers")
    (start, end), dtype = entry["data_offsets"], np.dtype(DTYPES[entry["dtype"]])
    shape = tuple(entry["shape"])
    if end - start != dtype.itemsize * int(np.prod(shape)) or first + end > size:
        raise ValueError("it is cut off")
    if end == start:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, "r", first + start, shape)


def _top(dtype: Any) -> int:
    return int(np.iinfo(dtype).max)


def _sync_folder(folder: Path) -> None:
    """Make a rename in this folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
