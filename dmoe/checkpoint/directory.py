"""A run's `checkpoints/` directory: list steps, find the newest intact one, delete old ones.

`step-00000100` is a checkpoint, `step-00000100.tmp` a partial one that is still being written.
Order is by step number, never by modification time: a clock set back must not make an old step the
newest. Only directories with a checkpoint's exact name count; symbolic links are never followed.
"""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

from dmoe.checkpoint.manifest import parse_step, partial_name, verify
from dmoe.config.errors import CheckpointError


def list_steps(root: Path) -> list[tuple[int, Path]]:
    """List `(step, path)` of every checkpoint under `root`, lowest step first, damaged ones too.

    Empty if `root` does not exist.
    """
    return _scan(root, partial=False)


def latest(root: Path) -> Path | None:
    """Return the intact checkpoint with the highest step, or None if `root` has no checkpoint.

    Newer damaged ones are skipped with one warning that names the bad file of each. Local: a
    distributed run uses `save_load.find_latest`, which asks rank 0 only.
    Cost: hashes every byte of the newest checkpoint (and of each damaged one that is skipped).

    Raises:
        CheckpointError: there are checkpoints but none is intact (a fresh start would overwrite the
            run).
    """
    problems: list[str] = []
    for _, path in reversed(list_steps(root)):
        try:
            verify(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if problems:
            warnings.warn(f"falling back to {path.name}: {'; '.join(problems)}", stacklevel=2)
        return path
    if problems:
        raise CheckpointError(f"no checkpoint under {root} is intact: {'; '.join(problems)}")
    return None


def prune(root: Path, keep: int, verified: Path | None = None) -> list[Path]:
    """Delete all but the newest `keep` complete checkpoints, and every partial one.

    Only checkpoints with all files at the right sizes count towards `keep`, so failed saves never
    displace a good one (accelerate's `total_limit` deletes the old one before the new one exists).
    At least one of those kept must have correct hashes; otherwise nothing is deleted, with one
    warning. Call it on one rank only, and not during a save.

    Args:
        root: the `checkpoints/` directory.
        keep: number of checkpoints to keep, at least 1.
        verified: a checkpoint that the caller has just verified: if it is kept, nothing is hashed
            again. Without it one checkpoint is read, if there is something to delete.

    Returns:
        The deleted paths.

    Raises:
        CheckpointError: `keep` is below 1.
        OSError: a deletion failed.
    """
    if keep < 1:
        raise CheckpointError(f"keep={keep}: at least one checkpoint must be kept")
    removed = remove_partials(root)
    steps = [path for _, path in reversed(list_steps(root))]
    kept = [path for path in steps if is_intact(path, contents=False)][:keep]
    if len(kept) < keep:
        return removed
    old = steps[steps.index(kept[-1]) + 1 :]
    if old and verified not in kept and not any(is_intact(path, contents=True) for path in kept):
        warnings.warn(
            f"nothing is pruned: none of the newest {keep} checkpoints under {root} is intact",
            stacklevel=2,
        )
        return removed
    for path in old:
        remove_checkpoint(path)
    return removed + old


def remove_partials(root: Path) -> list[Path]:
    """Delete and return the partial checkpoints of killed saves.

    Call it on one rank only, and not during a save. Raises OSError.
    """
    partials = [path for _, path in _scan(root, partial=True)]
    for path in partials:
        remove_entry(path)
    return partials


def remove_entry(path: Path) -> None:
    """Delete a file, a link (not its target) or a directory, if it exists. Raises OSError."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable, after a rename for example. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint; rename it first, so that an interrupted deletion leaves a partial one.

    Raises OSError.
    """
    parsed = parse_step(path.name)
    assert parsed is not None
    partial = path.with_name(partial_name(parsed[0]))
    remove_entry(partial)
    os.rename(path, partial)
    shutil.rmtree(partial)


def is_intact(path: Path, *, contents: bool = True) -> bool:
    """Return True if `manifest.verify` accepts it (without `contents`: names and sizes only)."""
    try:
        verify(path, contents=contents)
    except CheckpointError:
        return False
    return True


def _scan(root: Path, *, partial: bool) -> list[tuple[int, Path]]:
    found: list[tuple[int, Path]] = []
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                parsed = parse_step(entry.name)
                if parsed is None or parsed[1] is not partial:
                    continue
                # A partial one may also be a file or a link: `remove_entry` deletes the entry.
                if partial or entry.is_dir(follow_symlinks=False):
                    found.append((parsed[0], Path(root, entry.name)))
    except FileNotFoundError:
        return []
    return sorted(found)
