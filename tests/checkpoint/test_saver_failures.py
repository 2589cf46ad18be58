"""A failed save in a writer thread is raised once on all ranks; old checkpoints stay."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dmoe.checkpoint import AsyncSaver, consensus, list_steps
from dmoe.checkpoint.async_saver import Staging
from dmoe.distributed.mesh import build_mesh
from tests.checkpoint.helpers import (
    constant_state,
    disk_full,
    error_message,
    loaded_value,
    patched,
    saved_steps,
    wait_until_failed,
)
from tests.checkpoint.states import sharded_state
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks


def failing_writer(rank: int, world: int, root: Path) -> list[str]:
    saver = AsyncSaver(root, 2, build_mesh(world, torch.device("cpu")).checkpoint_group, True)
    saver.save(100, sharded_state(world, world), {})
    saver.wait()
    messages = []

    for name in ("fsync", "rename"):  # rank 1's own file; the commit, which is rank 0's
        with patched(os, name, disk_full if rank == (name == "fsync") else getattr(os, name)):
            saver.save(200, sharded_state(world, world), {})
            wait_until_failed(saver)
        messages.append(error_message(saver.wait))
        assert not saver.failed
        saver.wait()  # told once
        dist.barrier()
        assert [entry.name for entry in root.iterdir()] == ["step-00000100"]
        dist.barrier()
    with patched(Staging, "copy", disk_full if rank == 1 else Staging.copy):
        saver.save(200, sharded_state(world, world), {})
    messages.append(error_message(lambda: saver.save(300, sharded_state(world, world), {})))
    saver.save(400, sharded_state(world, world), {})
    saver.close()
    assert [saved.step for saved in saver.take_finished()] == [100, 400]
    assert saved_steps(root) == [100, 400]
    return messages


def test_a_failure_of_one_writer_is_raised_on_all_ranks(tmp_path: Path) -> None:
    results = run_ranks(2, failing_writer, tmp_path)
    assert results[0] == results[1]
    assert "writing" in results[0][0]
    assert "committing" in results[0][1]
    assert results[0][2].startswith("copying the state of step 200 failed on rank 1")
    assert all("No space left on device" in message for message in results[0])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 256 KiB."""
    root = tmp_path / "disk"
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(root)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small tmpfs needs root")
    yield root
    subprocess.run(["umount", str(root)], check=True)


def test_a_full_disk_leaves_the_previous_checkpoint(small_disk: Path) -> None:
    saver = AsyncSaver(small_disk, 2, None, True)
    saver.save(1, constant_state(1.0), {})
    saver.save(2, {"w": torch.ones(100_000)}, {})
    assert "No space left on device" in error_message(
        lambda: saver.save(3, constant_state(3.0), {})
    )  # the error of 2; 3 is not started
    saver.close()
    assert [entry.name for entry in small_disk.iterdir()] == ["step-00000001"]
    saver.save(4, constant_state(4.0), {})
    saver.close()
    assert [loaded_value(path) for _, path in list_steps(small_disk)] == [1.0, 4.0]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_failed_saves_displace_no_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """keep=2, then three failed saves: both complete checkpoints are still there."""
    saver = AsyncSaver(tmp_path, 2, None, asynchronous)
    for step in (1, 2):
        saver.save(step, constant_state(step), {})
    saver.wait()

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_full)
        for step in (3, 4, 5):
            assert "No space left" in error_message(
                lambda step=step: (saver.save(step, constant_state(step), {}), saver.wait())
            )
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    assert [loaded_value(path) for _, path in list_steps(tmp_path)] == [1.0, 2.0]


def test_a_broken_group_is_not_a_checkpoint_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training may continue after a CheckpointError, but not after the death of a peer."""

    def broken(*args: object) -> None:
        raise RuntimeError("Connection closed by peer")

    saver = AsyncSaver(tmp_path, 2, None, True)
    with monkeypatch.context() as patch:
        patch.setattr(consensus.RankGroup, "_raise_if_any_failed", broken)
        saver.save(1, constant_state(1.0), {})
        wait_until_failed(saver)
        with pytest.raises(RuntimeError, match="closed by peer"):
            saver.wait()
    saver.close()
