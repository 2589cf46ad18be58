"""A run's `checkpoints/` directory: which steps are there, which is the newest whole one, which may go.

Order is by step number, never by a clock or a modification time: a clock set back must not make an old step the newest.
Only directories with a checkpoint's exact name count; symbolic links are never followed, whatever they point to.

Names inside `checkpoints/`: `step-00000100` is a checkpoint, `step-00000100.tmp` is one still being written.
"""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

from dmoe.checkpoint.manifest import partial_name, parse_step, verify
from dmoe.config.errors import CheckpointError


def list_steps(root: Path) -> list[tuple[int, Path]]:
    """`(step, path)` of every checkpoint directory under `root`, lowest step first; whole or damaged is not looked at.

    A root that does not exist holds none.
    """
    return _scan(root, partial=False)


def latest(root: Path) -> Path | None:
    """The whole checkpoint with the highest step, or None where `root` holds none at all.

    Damaged ones above it are skipped with one warning that names the bad file of each. Purely local: in a distributed run use
    `store.find_latest`, which asks rank 0 only.
    Raises: CheckpointError if there are checkpoints and none is whole: starting over in silence would overwrite the run.
    Cost: hashes every byte of the newest checkpoint (and of each damaged one above the result).
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
        raise CheckpointError(f"no checkpoint under {root} is whole: {'; '.join(problems)}")
    return None


def prune(root: Path, keep: int, verified: Path | None = None) -> list[Path]:
    """Delete what is older than the newest `keep` complete checkpoints, and every partial one; returns what was deleted.

    Only checkpoints whose files are all there with the right sizes count towards `keep`, so failed saves never push a good one
    out (accelerate's `total_limit` deletes the old one before the new one exists). Before anything is deleted one of
    those kept is proven whole by its hashes; if none is, nothing is deleted and one warning says so.
    Call it on one rank only, and not while a save is running.

    proven: a checkpoint that the caller has verified just now: if it is among those kept, nothing is hashed again.
    Errors: CheckpointError for keep < 1; OSError. Cost: without `proven`, reads one checkpoint if there is something to delete.
    """
    if keep < 1:
        raise CheckpointError(f"keep={keep}: at least one checkpoint must be kept")
    gone = remove_partials(root)
    steps = [path for _, path in reversed(list_steps(root))]
    kept = [path for path in steps if is_intact(path, contents=False)][:keep]
    if len(kept) < keep:
        return gone
    old = steps[steps.index(kept[-1]) + 1 :]
    if old and verified not in kept and not any(is_intact(path, contents=True) for path in kept):
        warnings.warn(
            f"nothing is pruned: none of the newest {keep} checkpoints under {root} is whole",
            stacklevel=2,
        )
        return gone
    for path in old:
        remove_checkpoint(path)
    return gone + old


def remove_partials(root: Path) -> list[Path]:
    """Delete what saves that were killed have left, and return it. One rank only, while nobody saves under `root`. Errors: OSError."""
    gone = [path for _, path in _scan(root, partial=True)]
    for path in gone:
        remove_entry(path)
    return gone


def remove_entry(path: Path) -> None:
    """Remove a partial checkpoint if it is there: a directory with its contents, of a link only the link. Errors: OSError."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable: without it a rename can be lost with the power. Errors: OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint. It is renamed first: a deletion cut short must leave a stale partial, not a damaged one. Errors: OSError."""
    named = parse_step(path.name)
    assert named is not None
    partial = path.with_name(partial_name(named[0]))
    remove_entry(partial)
    os.rename(path, partial)
    shutil.rmtree(partial)


def is_intact(path: Path, *, contents: bool = True) -> bool:
    """Whether `manifest.verify` accepts the checkpoint; without `contents`, by its names and sizes alone."""
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
                named = parse_step(entry.name)
                # A partial one may be anything, also a link: `discard` removes the entry itself.
                if (
                    named is not None
                    and named[1] is partial
                    and (partial or entry.is_dir(follow_symlinks=False))
                ):
                    found.append((named[0], Path(root, entry.name)))
    except FileNotFoundError:
        return []
    return sorted(found)
