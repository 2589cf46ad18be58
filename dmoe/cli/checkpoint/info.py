"""Contents and integrity of a run's checkpoints, from manifests and headers, without a model.

From cheap to expensive: `find_checkpoints` lists them, `inspect_checkpoint` reads a manifest and
the headers of its files, `verify_checkpoint` hashes all bytes.
"""

from __future__ import annotations

import json
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

BYTES_PER_ELEMENT = {
    **dict.fromkeys(("float64", "int64"), 8),
    **dict.fromkeys(("float32", "int32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16"), 2),
}
"""Of each dtype; the others have one byte."""
EXPERTS = re.compile(r"model\.(.+)\.experts\.[^.]+")
"""Name of a stack of experts [E, ...]; the group is the layer."""
ONE_EXPERT = re.compile(r"model\.(.+)\.experts\.(\d+)\.[^.]+")
"""Name of a matrix of one of the experts that differ in shape; the groups are layer and id."""
MOMENT = re.compile(r"optim\.\w+\.")


@dataclass(frozen=True)
class CheckpointList:
    """The checkpoints under a path, lowest step first."""

    root: Path
    checkpoints: list[Path]
    partial: list[Path]
    """Unfinished saves: neither checkpoints nor damage."""


@dataclass(frozen=True)
class ShardSlice:
    """Part of a tensor in a file: `shape` elements at `offset` of the full tensor."""

    name: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ShardFile:
    """One file and the contents of its header."""

    name: str
    size: int
    pieces: list[ShardSlice]
    experts: list[int]
    """Global ids of the routed experts that have weights in it."""


@dataclass(frozen=True)
class CheckpointContents:
    """Contents of one checkpoint; None or empty for what its writer did not record.

    The field names are the keys of `dmoe checkpoint inspect --json`.
    """

    path: str
    step: int
    written: str
    """Local time of the manifest file."""
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
    """Number of experts of each MoE layer, by its name."""
    owners: list[dict[str, Any]]
    """Global experts of each EP rank, and the ranks with that EP rank."""
    files: list[ShardFile]
    problem: str | None
    """Damage that names and sizes show, or None."""


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """Result of `verify_checkpoint`."""

    path: str
    step: int
    files: int
    bytes: int
    problem: str | None
    """The first damage found, with the file's name; None if every byte is as written."""
    seconds: float


def find_checkpoints(given: str) -> CheckpointList:
    """Return the checkpoints of a run or of a `checkpoints/` directory, or the given checkpoint.

    Raises: ConfigError if `given` is none of these; CheckpointError if there is no checkpoint yet.
    """
    path = Path(given)
    name = path.resolve().name
    step = parse_step(name)
    fix = "give a run, e.g. runs/latest, or one of its checkpoints"
    if not path.is_dir():
        raise ConfigError("RUN", given, "is no directory", fix)
    if step is not None and step[1]:
        raise CheckpointError(f"{path} is no checkpoint: its save has not finished")
    if step is not None or (path / MANIFEST).exists():
        return CheckpointList(path, [path], [])
    root = path / "checkpoints"
    if not root.is_dir():
        root = path
        is_run = (path / "resolved.yaml").is_file()
        if name != "checkpoints" and not list_steps(path) and not is_run:
            allowed = "is neither a run, nor a directory of checkpoints, nor a checkpoint"
            raise ConfigError("RUN", given, allowed, "give one, e.g. runs/latest")
    checkpoints = [step_path for _, step_path in list_steps(root)]
    if not checkpoints:
        problem = f"{path} has no checkpoint yet"
        raise CheckpointError(f"{problem}: train longer, or lower checkpoint.every")
    return CheckpointList(root, checkpoints, _partial(root))


def newest_intact(found: CheckpointList) -> Path:
    """Return the newest checkpoint whose files have the right sizes; without one, the newest.

    Cost: reads manifests.
    """
    intact = (path for path in reversed(found.checkpoints) if _problem(path) is None)
    return next(intact, found.checkpoints[-1])


def inspect_checkpoint(path: Path) -> CheckpointContents:
    """Return the contents of the checkpoint at `path`. Cost: reads headers only.

    Raises CheckpointError for an invalid manifest, or a checkpoint that was deleted meanwhile.
    """
    try:
        return _contents(path)
    except FileNotFoundError:
        problem = f"{path} is gone: a running job deletes its oldest checkpoints; ask again"
        raise CheckpointError(problem) from None


def _contents(path: Path) -> CheckpointContents:
    manifest = read_manifest(path)
    extra, tensors = manifest.extra, manifest.tensors
    layers, kinds = _layers(tensors), _kinds(tensors)
    topology = _typed_value(extra, "topology", dict, {})
    uniform = not any(map(ONE_EXPERT.fullmatch, tensors))
    written = time.localtime((path / MANIFEST).stat().st_mtime)
    weights = [entry for name, entry in tensors.items() if kinds[name] == "weights"]
    return CheckpointContents(
        path=str(path),
        step=manifest.step,
        written=time.strftime("%Y-%m-%d %H:%M:%S", written),
        tokens=_typed_value(extra, "tokens", int, None),
        data=_typed_value(extra, "data", str, None),
        topology=topology,
        versions=_typed_value(extra, "versions", dict, {}),
        tensors=len(tensors),
        parameters=sum(prod(entry.shape) for entry in weights),
        bytes_by_kind=_bytes_by(tensors, kinds),
        bytes_by_dtype=_bytes_by(tensors, {name: entry.dtype for name, entry in tensors.items()}),
        layers=layers,
        owners=_owners(topology, layers) if uniform else [],
        files=[
            _shard_file(path / name, file.size) for name, file in sorted(manifest.files.items())
        ],
        problem=_problem(path),
    )


def verify_checkpoint(path: Path) -> VerifiedCheckpoint | None:
    """Hash every byte of a checkpoint and check that its files hold every tensor completely.

    None for one that was deleted meanwhile by a running job. Cost: reads all files once.
    """
    start, named = time.monotonic(), parse_step(path.resolve().name)
    manifest = problem = None
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
    paths = root.iterdir() if root.is_dir() else ()
    steps = {path: parse_step(path.name) for path in paths}
    return sorted(path for path, step in steps.items() if step is not None and step[1])


def _problem(path: Path) -> str | None:
    try:
        verify_manifest(path, contents=False)
    except CheckpointError as error:
        return str(error)
    return None


def _kinds(tensors: Mapping[str, TensorEntry]) -> dict[str, str]:
    """Return `weights`, `moments` or `other` for each tensor.

    Weights have moments; buffers are `other`. Without an optimizer the whole model is weights.
    """
    moments = {name for name in tensors if MOMENT.match(name)}
    weights = {MOMENT.sub("model.", name) for name in moments}
    weights = weights or {name for name in tensors if name.startswith("model.")}
    kinds = dict.fromkeys(tensors, "other")
    kinds |= dict.fromkeys(weights & kinds.keys(), "weights")
    return kinds | dict.fromkeys(moments, "moments")


def _bytes_by(tensors: Mapping[str, TensorEntry], group: Mapping[str, str]) -> dict[str, int]:
    count: Counter[str] = Counter()
    for name, entry in tensors.items():
        count[group[name]] += prod(entry.shape) * BYTES_PER_ELEMENT.get(entry.dtype, 1)
    return dict(count.most_common())


def _layers(tensors: Mapping[str, TensorEntry]) -> dict[str, int]:
    stacks = ((EXPERTS.fullmatch(name), entry) for name, entry in tensors.items())
    layers = {match[1]: entry.shape[0] for match, entry in stacks if match and entry.shape}
    for match in filter(None, map(ONE_EXPERT.fullmatch, tensors)):
        layers[match[1]] = max(layers.get(match[1], 0), int(match[2]) + 1)
    return layers


def _owners(topology: Mapping[str, int], layers: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return experts and ranks of each EP rank: it has the r-th part of each layer's experts.

    In the ranks of `distributed/mesh.py` EP rank r is every EP-th rank from r on. Empty for experts
    that differ in shape: which file holds which expert is in `files`.
    """
    world_size, ep = topology.get("world", 1), topology.get("ep", 1)
    num_experts = max(layers.values(), default=0)
    if not num_experts or ep < 1 or num_experts % ep:
        return []
    share = num_experts // ep
    ranks = [list(range(rank, world_size, ep)) for rank in range(ep)]
    experts = [list(range(rank * share, (rank + 1) * share)) for rank in range(ep)]
    return [{"ep_rank": r, "ranks": ranks[r], "experts": experts[r]} for r in range(ep)]


def _shard_file(path: Path, size: int) -> ShardFile:
    slices = _slices(path)
    experts: set[int] = set()
    for part in slices:
        if EXPERTS.fullmatch(part.name):
            experts.update(range(part.offset[0], part.offset[0] + part.shape[0]))
        elif match := ONE_EXPERT.fullmatch(part.name):
            experts.add(int(match[2]))
    return ShardFile(path.name, size, slices, sorted(experts))


def _slices(path: Path) -> list[ShardSlice]:
    """Return the slices in a header; empty if it is invalid, which `problem` reports."""
    try:
        with safe_open(str(path), framework="np") as file:
            offsets = json.loads((file.metadata() or {})["DCP_SHARDING_INFO"])
            shapes = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
            return [
                ShardSlice(name, tuple(offsets[name]["saved_offsets"]), tuple(shape))
                for name, shape in shapes.items()
            ]
    except Exception:  # whatever a malformed header makes the parsers raise
        return []


def _typed_value(extra: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = extra.get(key)
    return value if isinstance(value, kind) else default
