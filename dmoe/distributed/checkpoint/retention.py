"""What happens to a checkpoint once it is there: all ranks prove it, then rank 0 forgets the old ones; never the other way round."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch.distributed as dist

from dmoe.config.errors import CheckpointError
from dmoe.distributed.checkpoint import layout, manifest
from dmoe.distributed.checkpoint.agree import RankGroup
from dmoe.distributed.checkpoint.manifest import Manifest

__all__ = ["discard_partials", "verify_on_all", "verify_and_prune"]


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
            layout.prune(path.parent, keep, proven=path)
    return found


def verify_on_all(path: Path, *, group: dist.ProcessGroup | None = None) -> Manifest:
    """The manifest of a checkpoint just written, after hashing all its files, each rank its share; a damaged one is removed.

    Raises: CheckpointError on every rank. Collective.
    """
    ranks, found = RankGroup(group), None
    try:
        with ranks.all_or_none(f"verifying {path}"):
            found = manifest.verify(path, rank=ranks.rank, world=ranks.world)
    except CheckpointError:
        if ranks.rank == 0:
            _remove(path)
        raise
    assert found is not None
    return found


def discard_partials(root: Path, *, group: dist.ProcessGroup | None = None) -> None:
    """Before a run goes on: delete what its killed predecessor was writing; collective over `group`.

    Raises: CheckpointError on every rank if rank 0 cannot delete.
    """
    ranks = RankGroup(group)
    with ranks.all_or_none(f"removing unfinished checkpoints under {root}"):
        if ranks.rank == 0:
            layout.discard_partials(root)


def _remove(path: Path) -> None:
    try:
        layout.remove(path)
    except OSError as error:
        warnings.warn(f"{path}, which is damaged, could not be removed: {error}", stacklevel=3)
