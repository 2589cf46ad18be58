"""A new checkpoint is verified before an old one is deleted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dmoe.checkpoint import AsyncSaver, directory, manifest, save_load, verify
from dmoe.distributed.mesh import build_mesh
from tests.checkpoint.helpers import constant_state, error_message, patched
from tests.checkpoint.states import sharded_state
from tests.ranks import run_ranks


def test_nothing_is_deleted_before_the_new_one_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def told(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *args: Any, **kwargs: Any) -> Any:
            events.append(f"{name} {path.name}")
            return function(path, *args, **kwargs)

        return call

    saver = AsyncSaver(tmp_path, 1, None, False)
    saver.save(1, constant_state(1.0), {})
    monkeypatch.setattr(manifest, "hash_file", told("hash", manifest.hash_file))
    monkeypatch.setattr(directory, "remove_checkpoint", told("remove", directory.remove_checkpoint))
    saver.save(2, constant_state(2.0), {})
    shard = "shard-00001-model-00001-of-00001.safetensors"
    assert events == [
        f"hash {shard}",
        f"hash {shard}",
        "remove step-00000001",
    ]  # hashed once when written and once when verified


def save_damaged(rank: int, world: int, root: Path) -> list[str]:
    """Save; after the commit, damage the file of the last rank."""
    saver, original = (
        AsyncSaver(root, 1, build_mesh(world, torch.device("cpu")).checkpoint_group, True),
        save_load.save,
    )
    saver.save(1, sharded_state(world, world), {})
    saver.wait()

    def rotten(*args: Any, **kwargs: Any) -> Path:
        path = original(*args, **kwargs)
        if rank == world - 1:
            shard = max(path.glob("shard-*"))
            data = bytearray(shard.read_bytes())
            data[-1] ^= 1
            shard.write_bytes(data)
        dist.barrier()
        return path

    with patched(save_load, "save", rotten):
        saver.save(2, sharded_state(world, world), {})
        message = error_message(saver.wait)
    dist.barrier()
    return [message, *sorted(entry.name for entry in root.iterdir())]


def test_a_damaged_new_checkpoint_is_removed_and_the_old_one_kept(
    tmp_path: Path,
) -> None:
    results = run_ranks(2, save_damaged, tmp_path)
    assert results[0] == results[1]
    assert "shard-00002-model-00001-of-00001.safetensors was changed" in results[0][0]
    assert results[0][1:] == ["step-00000001"]
    verify(tmp_path / "step-00000001")


def test_partial_checkpoints_of_killed_runs_are_removed(tmp_path: Path) -> None:
    save_load.save(tmp_path, 1, constant_state(1.0), {})
    for step in (2, 7):
        (tmp_path / f"step-0000000{step}.tmp").mkdir()
        (tmp_path / f"step-0000000{step}.tmp" / "shard").write_text("half")
    (tmp_path / "notes.tmp").write_text("somebody else's")
    save_load.remove_partials(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["notes.tmp", "step-00000001"]
    save_load.remove_partials(tmp_path / "none")
