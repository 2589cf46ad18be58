"""Saving and loading: a state of plain tensors and DTensors, at any number of ranks, as safetensors with a manifest.

    save:  step-N.tmp -> each rank writes its shard -> each rank hashes its own file -> rank 0 writes the manifest -> rename
    load:  manifest -> every file's hash -> headers -> names, shapes, dtypes -> only then the tensors are filled, in place

The directory must be on a file system that all ranks see.

What happens to a checkpoint once it is there: all ranks prove it, then rank 0 forgets the old ones; never the other way round.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.checkpoint import directory, manifest
from dmoe.checkpoint.consensus import RankGroup
from dmoe.checkpoint.dcp import read_shards, write_shards
from dmoe.checkpoint.manifest import FileEntry, Manifest, TensorEntry, partial_name, step_name
from dmoe.checkpoint.tensor_entries import describe_tensors, check_matches
from dmoe.checkpoint.validate import check_replicas, check_shards, shard_path
from dmoe.config.errors import CheckpointError


def save(
    root: Path,
    step: int,
    state: Mapping[str, Tensor],
    extra: dict[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write the checkpoint `root/step-N`, whole or not at all; collective over `group` (None: the world, or one process).

    state: name to a plain tensor, which must be equal on all ranks and is written once, or to a DTensor, whose pieces are
        written once each; the same names on all ranks. float64/32/16, bfloat16, int64/32/16/8, uint8, bool; any shape.
    extra: plain JSON; rank 0's is written.
    Raises: CheckpointError on every rank if anything fails on any; what was written is removed, older checkpoints are
        untouched. Also for a `step` that already exists whole; a damaged one is replaced.
    Cost: about 6 small all-reduces and 3 small all-gathers plus DCP's own two exchanges of plans; disk: every piece once, read
        once more for its hash; memory: none to speak of on the CPU, one tensor at a time from an accelerator.
    """
    root, ranks, contents = Path(root), RankGroup(group), dict[str, TensorEntry]()
    partial, final = root / partial_name(step), root / step_name(step)
    with ranks.all_or_none(f"saving step {step}"):
        manifest.check_extra(extra)
        contents = describe_tensors(state)
        if not contents:
            raise CheckpointError("there is no tensor to save")
    check_replicas(ranks, state, contents)
    with _remove_on_error(ranks, partial):
        with ranks.all_or_none(f"making {partial}"):
            if ranks.rank == 0:
                _make_partial(partial, final)
        with ranks.all_or_none(f"writing {partial}"):
            write_shards(partial, {name: state[name] for name in contents}, ranks.group)
        row = torch.zeros(40, dtype=torch.uint8)
        with ranks.all_or_none(f"hashing {partial}"):
            row = _hash_own_file(partial, ranks.rank)
        rows = ranks.gather(row)
        with ranks.all_or_none(f"committing {final}"):
            if ranks.rank == 0:
                _commit(partial, final, Manifest(step, _files(partial, rows), contents, extra))
    return final


def load(
    path: Path,
    state: Mapping[str, Tensor],
    *,
    prefix: str | tuple[str, ...] = "",
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Fill `state`'s tensors in place from the checkpoint at `path` and return its `extra`; collective over `group`.

    state: exactly the checkpoint's names that start with `prefix` (default: all), with its global shapes and dtypes; plain
        tensors or DTensors, at any world and EP size, on any device, leaf parameters included.
    Raises: CheckpointError on every rank, before any tensor is touched, for a damaged checkpoint (the file is named) or a name
        that is missing, extra, or of another shape or dtype. A disk that fails *while* tensors are read can leave them half
        filled: the error says so, and the state must not be used.
    Cost: reads the checkpoint once for the hashes (shared over the ranks) and each rank's pieces once; 2 small all-reduces and
        DCP's exchange of plans.
    """
    path, ranks, extra = Path(path), RankGroup(group), dict[str, Any]()
    with ranks.all_or_none(f"loading {path}"):
        found = manifest.verify(path, rank=ranks.rank, world_size=ranks.size)
        check_matches(found, state, prefix)
        check_shards(path, found.files, found.tensors)
        extra = found.extra
    with ranks.all_or_none(f"reading tensors of {path}, some of which may be half filled now,"):
        read_shards(path, state, ranks.group)
    return extra


def read_manifest(path: Path) -> Manifest:
    """The manifest alone: step, tensors, `extra`. Local; hashes no other file. Raises: CheckpointError."""
    return manifest.read(Path(path))


def read_manifest_on_all(path: Path, *, group: dist.ProcessGroup | None = None) -> Manifest:
    """`peek` on every rank; collective over `group`. Raises: CheckpointError on every rank if it fails on any."""
    with RankGroup(group).all_or_none(f"looking at {path}"):
        return read_manifest(path)
    raise AssertionError("a stage that failed has raised")


def find_latest(root: Path, *, group: dist.ProcessGroup | None = None) -> Path | None:
    """`layout.latest` as rank 0 sees it, on every rank; collective over `group`.

    Raises: CheckpointError on every rank if there are checkpoints and none is whole. Cost: rank 0 hashes the newest one.
    """
    ranks, step = RankGroup(group), -1
    with ranks.all_or_none(f"looking for a checkpoint under {root}"):
        newest = directory.latest(Path(root)) if ranks.rank == 0 else None
        step = -1 if newest is None else manifest.read(newest).step
    step = ranks.broadcast_from_rank0(step)
    return None if step < 0 else Path(root) / step_name(step)


def _make_partial(partial: Path, final: Path) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    directory.remove_entry(partial)
    if final.is_symlink() or final.exists():
        if directory.is_intact(final):
            raise CheckpointError(
                f"{final} exists and is whole: remove it or use another run directory"
            )
        directory.remove_entry(
            final
        )  # damaged, so `latest` skipped it and this run came past the same step again
    partial.mkdir()


def _hash_own_file(partial: Path, rank: int) -> Tensor:
    """Size (8 bytes) and SHA-256 (32) of the file this rank wrote, zeros for none: uint8 [40].

    Each rank hashes its own file, still in its page cache, so hashing is as parallel as writing and rank 0 no bottleneck; the
    digests travel as a tensor, not as pickled objects.
    """
    path = shard_path(partial, rank)
    if path is None:
        return torch.zeros(40, dtype=torch.uint8)
    entry = manifest.hash_file(path)
    return torch.tensor(
        list(entry.size.to_bytes(8, "little") + bytes.fromhex(entry.sha256)), dtype=torch.uint8
    )


def _files(partial: Path, rows: Tensor) -> dict[str, FileEntry]:
    """The ranks' rows of `_hash_own` [W, 40], by the name of the file each rank wrote."""
    files: dict[str, FileEntry] = {}
    for rank, row in enumerate(bytes(row) for row in rows.tolist()):
        if any(row):
            path = shard_path(partial, rank)
            if path is None:
                raise CheckpointError(
                    f"rank {rank} wrote a file that rank 0 does not see: {partial} must be on a shared disk"
                )
            files[path.name] = FileEntry(int.from_bytes(row[:8], "little"), row[8:].hex())
    return files


def _commit(partial: Path, final: Path, found: Manifest) -> None:
    """Manifest, fsync, rename, fsync: the rename is the instant at which the checkpoint exists."""
    check_shards(partial, found.files, found.tensors)
    if manifest.list_files(partial) != {name: entry.size for name, entry in found.files.items()}:
        raise CheckpointError(f"{partial} holds other files than this save has written")
    manifest.write(partial, found)
    directory.fsync_directory(partial)
    os.rename(partial, final)
    directory.fsync_directory(final.parent)


@contextmanager
def _remove_on_error(ranks: RankGroup, partial: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        if ranks.rank == 0:
            try:
                directory.remove_entry(partial)
            except OSError as error:
                warnings.warn(
                    f"{partial} could not be removed, the next save or prune will: {error}",
                    stacklevel=4,
                )
        raise


def verify_and_prune(path: Path, keep: int, *, group: dist.ProcessGroup | None = None) -> Manifest:
    """Read the checkpoint at `path` back, then delete what is older than the newest `keep` complete ones; collective over `group`.

    Raises: CheckpointError on every rank. If the new checkpoint is not what was written, it is removed and everything else stays; if
        rank 0 cannot delete, the new one stays and so do the old ones.
    Cost: every byte read once, shared over the ranks; 2 all-reduces of 4 bytes.
    """
    ranks = RankGroup(group)
    found = verify_on_all(path, group=group)
    with ranks.all_or_none(f"pruning {path.parent}"):
        if ranks.rank == 0:
            directory.prune(path.parent, keep, verified=path)
    return found


def verify_on_all(path: Path, *, group: dist.ProcessGroup | None = None) -> Manifest:
    """The manifest of a checkpoint just written, after hashing all its files, each rank its share; a damaged one is removed.

    Raises: CheckpointError on every rank. Collective.
    """
    ranks, found = RankGroup(group), None
    try:
        with ranks.all_or_none(f"verifying {path}"):
            found = manifest.verify(path, rank=ranks.rank, world_size=ranks.size)
    except CheckpointError:
        if ranks.rank == 0:
            _remove_damaged(path)
        raise
    assert found is not None
    return found


def remove_partials(root: Path, *, group: dist.ProcessGroup | None = None) -> None:
    """Before a run goes on: delete what its killed predecessor was writing; collective over `group`.

    Raises: CheckpointError on every rank if rank 0 cannot delete.
    """
    ranks = RankGroup(group)
    with ranks.all_or_none(f"removing unfinished checkpoints under {root}"):
        if ranks.rank == 0:
            directory.remove_partials(root)


def _remove_damaged(path: Path) -> None:
    try:
        directory.remove_checkpoint(path)
    except OSError as error:
        warnings.warn(f"{path}, which is damaged, could not be removed: {error}", stacklevel=3)
