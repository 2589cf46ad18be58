"""What a run's checkpoints hold, and whether they are whole: read from manifests and headers, without building a model.

Three questions, from cheap to dear: which checkpoints are there (`find`), what does one hold (`inspect`: its manifest and the headers
of its files), and is every byte still what was written (`verify`: all of it is hashed).
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from dmoe.checkpoint import list_steps
from dmoe.checkpoint.manifest import MANIFEST, TensorEntry, parse_step
from dmoe.checkpoint.manifest import read as read_manifest
from dmoe.checkpoint.manifest import verify as verify_manifest
from dmoe.checkpoint.validate import check_shards
from dmoe.config.errors import CheckpointError, ConfigError

BYTES = {
    "float64": 8,
    "int64": 8,
    "float32": 4,
    "int32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int16": 2,
}
"""Of one element; the other types have one byte."""
EXPERTS = re.compile(r"model\.(.+)\.experts\.[^.]+")
"""A stack of experts [E, ...]; the group names its layer."""
ONE_EXPERT = re.compile(r"model\.(.+)\.experts\.(\d+)\.[^.]+")
"""A matrix of one expert, where they differ in shape: layer and global id."""
MOMENT = re.compile(r"optim\.exp_avg(_sq)?\.")


@dataclass(frozen=True)
class Found:
    """The checkpoints under a path, lowest step first."""

    root: Path
    checkpoints: list[Path]
    partial: list[Path]
    """Saves that were not finished: no checkpoints, and no damage either."""


@dataclass(frozen=True)
class ShardSlice:
    """A part of a tensor in a file: `shape` elements at `offset` of the whole."""

    name: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ShardFile:
    """One file, with what its header says."""

    name: str
    size: int
    pieces: list[ShardSlice]
    experts: list[int]
    """Global ids of the routed experts of which it holds weights."""


@dataclass(frozen=True)
class Contents:
    """What one checkpoint holds. What the program that saved it did not say is None or empty."""

    path: str
    step: int
    written: str
    """By the clock of the machine that wrote it."""
    tokens: int | None
    data: str | None
    """Fingerprint of the data it was trained on."""
    topology: dict[str, int]
    versions: dict[str, str]
    tensors: int
    parameters: int
    bytes_by_kind: dict[str, int]
    bytes_by_dtype: dict[str, int]
    layers: dict[str, int]
    """Experts of each mixture layer, by its name."""
    owners: list[dict[str, Any]]
    """Which global experts lay on which EP rank, and which ranks those were."""
    files: list[ShardFile]
    problem: str | None
    """What names and sizes alone show to be damaged; the bytes themselves are not looked at."""


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """What `verify` found out about one checkpoint."""

    path: str
    step: int
    files: int
    bytes: int
    problem: str | None
    """The first one found, with the file's name; None: every byte is what was written."""
    seconds: float


def find(given: str) -> Found:
    """The checkpoints of a run directory, of a `checkpoints/` directory, or the one that `given` is.

    Raises: ConfigError if it is none of these; CheckpointError if there is no checkpoint yet.
    """
    path = Path(given)
    name = path.resolve().name
    named = parse_step(name)
    if not path.is_dir():
        raise ConfigError(
            "RUN",
            given,
            "is no directory",
            "give a run, e.g. runs/latest, or one of its checkpoints",
        )
    if named is not None and named[1]:
        raise CheckpointError(f"{path} is no checkpoint: its save has not finished")
    if named is not None or (path / MANIFEST).exists():
        return Found(path, [path], [])
    root = path / "checkpoints"
    if not root.is_dir():
        root = path
        if (
            name != "checkpoints"
            and not list_steps(path)
            and not (path / "resolved.yaml").is_file()
        ):
            allowed = "is neither a run, nor a directory of checkpoints, nor a checkpoint"
            raise ConfigError("RUN", given, allowed, "give one, e.g. runs/latest")
    found = Found(root, [step for _, step in list_steps(root)], _partial(root))
    if not found.checkpoints:
        raise CheckpointError(
            f"{path} has no checkpoint yet: train longer, or lower checkpoint.every"
        )
    return found


def newest(found: Found) -> Path:
    """The newest checkpoint whose files are there with the right sizes; if none is, the newest. Cost: reads manifests."""
    whole = (path for path in reversed(found.checkpoints) if _problem(path) is None)
    return next(whole, found.checkpoints[-1])


def inspect(path: Path) -> Contents:
    """What the checkpoint at `path` holds. Cost: reads headers only.

    Raises: CheckpointError for a manifest that cannot be read, or a checkpoint that is gone meanwhile.
    """
    try:
        return _contents(path)
    except FileNotFoundError:
        gone = f"{path} is gone: a run that goes on forgets its oldest checkpoints; ask again"
        raise CheckpointError(gone) from None


def _contents(path: Path) -> Contents:
    manifest = read_manifest(path)
    extra, tensors = manifest.extra, manifest.tensors
    layers, kinds = _layers(tensors), _kinds(tensors)
    topology = _of(extra, "topology", dict, {})
    uniform = not any(map(ONE_EXPERT.fullmatch, tensors))
    return Contents(
        path=str(path),
        step=manifest.step,
        written=time.strftime(
            "%Y-%m-%d %H:%M:%S", time.localtime((path / MANIFEST).stat().st_mtime)
        ),
        tokens=_of(extra, "tokens", int, None),
        data=_of(extra, "data", str, None),
        topology=topology,
        versions=_of(extra, "versions", dict, {}),
        tensors=len(tensors),
        parameters=sum(
            prod(entry.shape) for name, entry in tensors.items() if kinds[name] == "weights"
        ),
        bytes_by_kind=_bytes_by(tensors, kinds),
        bytes_by_dtype=_bytes_by(tensors, {name: entry.dtype for name, entry in tensors.items()}),
        layers=layers,
        owners=_owners(topology, layers) if uniform else [],
        files=[_shard(path / name, manifest.files[name].size) for name in sorted(manifest.files)],
        problem=_problem(path),
    )


def verify(path: Path) -> VerifiedCheckpoint | None:
    """Hash every byte of the checkpoint at `path`, and see that its files hold every tensor, whole. Cost: reads it once.

    None for one that is gone meanwhile: a run that goes on forgets its oldest.
    """
    start, named = time.monotonic(), parse_step(path.resolve().name)
    manifest, problem = None, None
    try:
        manifest = verify_manifest(path)
        check_shards(path, manifest.files, manifest.tensors)
    except CheckpointError as error:
        if not path.exists():
            return None
        problem = str(error)
    step = manifest.step if manifest else named[0] if named else -1
    sizes = [entry.size for entry in manifest.files.values()] if manifest else []
    return VerifiedCheckpoint(
        str(path), step, len(sizes), sum(sizes), problem, round(time.monotonic() - start, 3)
    )


def _partial(root: Path) -> list[Path]:
    named = (
        ((parse_step(entry.name), entry.name) for entry in os.scandir(root))
        if root.is_dir()
        else ()
    )
    return sorted(root / name for step, name in named if step is not None and step[1])


def _problem(path: Path) -> str | None:
    try:
        verify_manifest(path, contents=False)
    except CheckpointError as error:
        return str(error)
    return None


def _kinds(tensors: Mapping[str, TensorEntry]) -> dict[str, str]:
    """A weight has moments; what the model keeps without (buffers) is `other`. Without an optimizer, all of the model is weights."""
    moments = {name for name in tensors if MOMENT.match(name)}
    weights = (
        {MOMENT.sub("model.", name) for name in moments}
        if moments
        else {n for n in tensors if n.startswith("model.")}
    )
    return {
        name: "moments" if name in moments else "weights" if name in weights else "other"
        for name in tensors
    }


def _bytes_by(tensors: Mapping[str, TensorEntry], group: Mapping[str, str]) -> dict[str, int]:
    count: Counter[str] = Counter()
    for name, entry in tensors.items():
        count[group[name]] += prod(entry.shape) * BYTES.get(entry.dtype, 1)
    return dict(count.most_common())


def _layers(tensors: Mapping[str, TensorEntry]) -> dict[str, int]:
    stacks = ((EXPERTS.fullmatch(name), entry) for name, entry in tensors.items())
    layers = {match[1]: entry.shape[0] for match, entry in stacks if match and entry.shape}
    for match in filter(None, map(ONE_EXPERT.fullmatch, tensors)):
        layers[match[1]] = max(layers.get(match[1], 0), int(match[2]) + 1)
    return layers


def _owners(topology: Mapping[str, int], layers: Mapping[str, int]) -> list[dict[str, Any]]:
    """EP rank r has the r-th share of each layer's experts; in the picture of topology.py it is every EP-th rank from r on. Nothing
    where experts differ in shape: which file holds whom is in `files`."""
    world, ep, experts = (
        topology.get("world", 1),
        topology.get("ep", 1),
        max(layers.values(), default=0),
    )
    if not experts or ep < 1 or experts % ep:
        return []
    share = experts // ep
    return [
        {
            "ep_rank": rank,
            "ranks": list(range(rank, world, ep)),
            "experts": list(range(rank * share, (rank + 1) * share)),
        }
        for rank in range(ep)
    ]


def _shard(path: Path, size: int) -> ShardFile:
    pieces = _pieces(path)
    experts = {
        piece.offset[0] + i
        for piece in pieces
        if EXPERTS.fullmatch(piece.name)
        for i in range(piece.shape[0])
    }
    experts |= {
        int(match[2]) for match in (ONE_EXPERT.fullmatch(piece.name) for piece in pieces) if match
    }
    return ShardFile(path.name, size, pieces, sorted(experts))


def _pieces(path: Path) -> list[ShardSlice]:
    """What the header names; nothing where it cannot be read, which `problem` and `verify` say in words."""
    try:
        with safe_open(str(path), framework="np") as file:
            offsets = json.loads((file.metadata() or {})["DCP_SHARDING_INFO"])
            names = sorted(file.keys())
            return [
                ShardSlice(
                    name,
                    tuple(offsets[name]["saved_offsets"]),
                    tuple(file.get_slice(name).get_shape()),
                )
                for name in names
            ]
    except Exception:  # as shards.py: whatever a malformed header makes the parsers raise
        return []


def _of(extra: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = extra.get(key)
    return value if isinstance(value, kind) else default
