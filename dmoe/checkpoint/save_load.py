"""Save, load and verify checkpoints of plain tensors and DTensors, at any number of ranks.

    save:  step-N.tmp -> every rank writes its shard and hashes it -> rank 0: manifest, rename
    load:  manifest -> hash of every file -> headers -> names, shapes, dtypes -> fill the tensors
    then:  verify the new checkpoint on all ranks -> delete old ones on rank 0

The directory must be on a file system that all ranks share.
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
from dmoe.checkpoint.consensus import RankGroup, check_replicas
from dmoe.checkpoint.dcp import read_shards, write_shards
from dmoe.checkpoint.manifest import FileEntry, Manifest, TensorEntry, partial_name, step_name
from dmoe.checkpoint.validate import check_matches, check_shards, describe_tensors, shard_path
from dmoe.config.errors import CheckpointError


def save(
    root: Path,
    step: int,
    state: Mapping[str, Tensor],
    extra: dict[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write the checkpoint `root/step-N` atomically. Collective over `group`.

    Cost: about 6 small all-reduces, 3 small all-gathers and DCP's two exchanges of plans. Every
    chunk is written once and read once for its hash. Extra memory: one tensor of an accelerator.

    Args:
        root: the `checkpoints/` directory.
        step: number of optimizer steps done.
        state: the same names on all ranks. A plain tensor must be equal on all ranks and is written
            once; of a DTensor each chunk is written once. float64/32/16, bfloat16, int64/32/16/8,
            uint8, bool; any shape.
        extra: plain JSON; rank 0's is written.
        group: the ranks; None: all ranks, or one process.

    Returns:
        The path of the checkpoint.

    Raises:
        CheckpointError: on every rank if anything fails on any, or if an intact checkpoint of
            `step` exists (a damaged one is replaced). Partial files are removed, older checkpoints
            are not touched.
    """
    root, ranks, entries = Path(root), RankGroup(group), dict[str, TensorEntry]()
    partial, final = root / partial_name(step), root / step_name(step)
    with ranks.all_or_none(f"saving step {step}"):
        manifest.check_extra(extra)
        entries = describe_tensors(state)
        if not entries:
            raise CheckpointError("there is no tensor to save")
    check_replicas(ranks, state, entries)
    with _remove_on_error(ranks, partial):
        with ranks.all_or_none(f"making {partial}"):
            if ranks.rank == 0:
                _make_partial(partial, final)
        with ranks.all_or_none(f"writing {partial}"):
            write_shards(partial, {name: state[name] for name in entries}, ranks.group)
        row = torch.zeros(40, dtype=torch.uint8)
        with ranks.all_or_none(f"hashing {partial}"):
            row = _hash_own_file(partial, ranks.rank)
        rows = ranks.gather(row)
        with ranks.all_or_none(f"committing {final}"):
            if ranks.rank == 0:
                _commit(partial, final, Manifest(step, _files(partial, rows), entries, extra))
    return final


def load(
    path: Path,
    state: Mapping[str, Tensor],
    *,
    prefix: str | tuple[str, ...] = "",
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Fill the tensors of `state` in place from the checkpoint at `path`. Collective over `group`.

    Cost: every byte is read once for the hashes (divided between the ranks), each rank's chunks
    once more; 2 small all-reduces and DCP's exchange of plans.

    Args:
        path: the checkpoint.
        state: exactly the checkpoint's names that start with `prefix`, with its global shapes and
            dtypes; plain tensors or DTensors, at any world and EP size, on any device, leaf
            parameters included.
        prefix: start of the names to load; default: all.
        group: the ranks; None: all ranks, or one process.

    Returns:
        The checkpoint's `extra`.

    Raises:
        CheckpointError: on every rank, before any tensor is changed, for a damaged checkpoint (with
            the file) or a name that is missing, extra, or of another shape or dtype. If a read
            fails later, some tensors may be filled: the message says so; do not use the state.
    """
    path, ranks, extra = Path(path), RankGroup(group), dict[str, Any]()
    with ranks.all_or_none(f"loading {path}"):
        found = manifest.verify(path, rank=ranks.rank, world_size=ranks.size)
        check_matches(found, state, prefix)
        check_shards(path, found.files, found.tensors)
        extra = found.extra
    with ranks.all_or_none(f"reading the tensors of {path} (some may be overwritten now)"):
        read_shards(path, state, ranks.group)
    return extra


def read_manifest(path: Path) -> Manifest:
    """Read the manifest only: step, tensors, `extra`. Local. Raises CheckpointError."""
    return manifest.read(Path(path))


def read_manifest_on_all(path: Path, *, group: dist.ProcessGroup | None = None) -> Manifest:
    """Run `read_manifest` on every rank; collective over `group`.

    Raises:
        CheckpointError: on every rank if it fails on any.
    """
    with RankGroup(group).all_or_none(f"reading the manifest of {path}"):
        return read_manifest(path)
    raise AssertionError("all_or_none has raised")


def find_latest(root: Path, *, group: dist.ProcessGroup | None = None) -> Path | None:
    """Return rank 0's `directory.latest` on every rank; collective over `group`.

    Cost: rank 0 hashes the newest checkpoint.

    Raises:
        CheckpointError: on every rank if there are checkpoints but none is intact.
    """
    ranks, step = RankGroup(group), -1
    with ranks.all_or_none(f"looking for a checkpoint under {root}"):
        newest = directory.latest(Path(root)) if ranks.rank == 0 else None
        step = -1 if newest is None else manifest.read(newest).step
    step = ranks.broadcast_from_rank0(step)
    return None if step < 0 else Path(root) / step_name(step)


def find(root: Path, step: int | None, *, group: dist.ProcessGroup | None = None) -> Path:
    """Return the checkpoint of a step, by default the newest intact one; collective over `group`.

    Raises:
        CheckpointError: on every rank if there is none.
    """
    found = find_latest(root, group=group) if step is None else root / step_name(step)
    if found is None:
        why = "has no checkpoint yet: train longer, or lower checkpoint.every"
        raise CheckpointError(f"{root.parent} {why}")
    if not found.is_dir():
        there = ", ".join(str(number) for number, _ in directory.list_steps(root)) or "none"
        raise CheckpointError(f"{root.parent} has no checkpoint of step {step}: there are {there}")
    return found


def _make_partial(partial: Path, final: Path) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    directory.remove_entry(partial)
    if final.is_symlink() or final.exists():
        if directory.is_intact(final):
            raise CheckpointError(
                f"{final} already exists and is intact: remove it or use another run directory"
            )
        # Damaged, so `latest` skipped it and this run reached the same step again.
        directory.remove_entry(final)
    partial.mkdir()


def _hash_own_file(partial: Path, rank: int) -> Tensor:
    """Hash the file this rank wrote: size (8 bytes) and SHA-256 (32), zeros for none: uint8 [40].

    The file is still in this rank's page cache, and rank 0 is no bottleneck. The result is a
    tensor, so that nothing is pickled to gather it.
    """
    path = shard_path(partial, rank)
    if path is None:
        return torch.zeros(40, dtype=torch.uint8)
    entry = manifest.hash_file(path)
    return torch.tensor(
        list(entry.size.to_bytes(8, "little") + bytes.fromhex(entry.sha256)), dtype=torch.uint8
    )


def _files(partial: Path, rows: Tensor) -> dict[str, FileEntry]:
    """Convert the ranks' rows of `_hash_own_file` [W, 40] to entries by file name."""
    files: dict[str, FileEntry] = {}
    for rank, row in enumerate(bytes(row) for row in rows.tolist()):
        if any(row):
            path = shard_path(partial, rank)
            if path is None:
                raise CheckpointError(
                    f"rank {rank} wrote a file that rank 0 does not see: {partial} must be on a"
                    " shared disk"
                )
            files[path.name] = FileEntry(int.from_bytes(row[:8], "little"), row[8:].hex())
    return files


def _commit(partial: Path, final: Path, found: Manifest) -> None:
    """Write the manifest, fsync, rename, fsync: the rename makes the checkpoint exist."""
    check_shards(partial, found.files, found.tensors)
    if manifest.list_files(partial) != {name: entry.size for name, entry in found.files.items()}:
        raise CheckpointError(f"{partial} holds files that this save did not write")
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
                    f"{partial} could not be removed; the next save or prune will: {error}",
                    stacklevel=4,
                )
        raise


def verify_and_prune(path: Path, keep: int, *, group: dist.ProcessGroup | None = None) -> Manifest:
    """Verify the new checkpoint, then keep only the newest `keep`; collective over `group`.

    Cost: every byte is read once, divided between the ranks; 2 all-reduces of 4 bytes.

    Raises:
        CheckpointError: on every rank. A new checkpoint that is damaged is removed and all others
            stay; if rank 0 cannot delete, new and old ones stay.
    """
    ranks = RankGroup(group)
    found = verify_on_all(path, group=group)
    with ranks.all_or_none(f"pruning {path.parent}"):
        if ranks.rank == 0:
            directory.prune(path.parent, keep, verified=path)
    return found


def verify_on_all(path: Path, *, group: dist.ProcessGroup | None = None) -> Manifest:
    """Hash all files of a new checkpoint, divided between the ranks; remove a damaged one.

    Collective over `group`.

    Returns:
        The manifest.

    Raises:
        CheckpointError: on every rank, if any file is damaged.
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
    """Delete the partial checkpoints of killed runs, before a run resumes; collective over `group`.

    Raises:
        CheckpointError: on every rank if rank 0 cannot delete.
    """
    ranks = RankGroup(group)
    with ranks.all_or_none(f"removing unfinished checkpoints under {root}"):
        if ranks.rank == 0:
            directory.remove_partials(root)


def _remove_damaged(path: Path) -> None:
    try:
        directory.remove_checkpoint(path)
    except OSError as error:
        warnings.warn(f"{path} is damaged and could not be removed: {error}", stacklevel=3)
