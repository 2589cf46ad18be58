"""Drill 4: SIGKILL at each file system call of a save: the old or the new checkpoint is intact.

A killed process loses no data that the kernel has received. So this tests the order of the calls
against process death; for a power failure, it tests only that fsync is called where needed.
"""

from __future__ import annotations

import builtins
import io
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dmoe.checkpoint import latest, list_steps, load
from dmoe.checkpoint.async_saver import AsyncSaver
from dmoe.checkpoint.save_load import remove_partials
from dmoe.distributed.local_ranks import RankError
from tests.checkpoint.states import full_state, ones_like, sharded_state
from tests.ranks import run_ranks

pytestmark = pytest.mark.drills

OLD, NEW, NEVER = 100, 200, (-1, -1)


def state_at(step: int) -> Callable[[Tensor], Tensor]:
    """Return the function that changes `full_state()` to the state at `step`."""
    return lambda tensor: (
        tensor ^ (step == NEW) if tensor.dtype == torch.bool else tensor + (step - OLD)
    )


class Disk:
    """Counts file system calls and kills the process at call number `fatal`.

    A write is half done then; other calls have not started.
    """

    def __init__(self, fatal: int) -> None:
        self.fatal, self.calls = fatal, list[str]()

    def install(self) -> None:
        """Replace the functions in this process."""
        # mkdir and open repeat earlier changes only
        for name in ("fsync", "rename", "unlink", "rmdir"):
            setattr(os, name, self._watched(name, getattr(os, name)))
        builtins.open = self._open(open)  # type: ignore[assignment]

    def reached(self, name: str) -> bool:
        """Count a call; return True if it is the fatal one."""
        self.calls.append(name)
        return len(self.calls) - 1 == self.fatal

    def _watched(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.reached(name):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    def _open(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if mode != "xb":
                return original(file, mode, *args, **kwargs)
            raw = WatchedFile(file, self)
            return raw if kwargs.get("buffering") == 0 else io.BufferedWriter(raw)

        return call


class WatchedFile(io.FileIO):
    """New file whose writes are counted."""

    def __init__(self, path: Path, disk: Disk) -> None:
        super().__init__(path, "xb")
        self.disk = disk

    def write(self, data: Any) -> int:
        if self.disk.reached("write"):
            super().write(memoryview(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write(data)


def save(rank: int, world: int, root: Path, step: int, fatal: tuple[int, int]) -> list[str]:
    """Save, verify and delete the previous checkpoint; return the calls of this rank.

    `fatal`: the rank that is killed, and at which of its calls.
    """
    state = sharded_state(world, 2, state_at(step))
    disk = Disk(fatal[1] if rank == fatal[0] else -1)
    disk.install()
    AsyncSaver(root, max_kept=1, group=None, asynchronous=False).save(step, state, {"step": step})
    return disk.calls


def assert_intact(root: Path) -> int:
    """Load the newest checkpoint, compare every bit with its step, return the step."""
    newest = latest(root)
    assert newest is not None
    state = {name: ones_like(tensor) for name, tensor in full_state().items()}
    step = int(load(newest, state)["step"])
    for name, tensor in full_state().items():
        assert torch.equal(state[name], state_at(step)(tensor)), f"{name} in {newest}"
    return step


def test_death_at_any_call_of_a_save_leaves_the_old_or_the_new_step(tmp_path: Path) -> None:
    before = tmp_path / "before"
    run_ranks(2, save, before, OLD, NEVER)
    undisturbed = shutil.copytree(before, tmp_path / "undisturbed")
    calls = run_ranks(2, save, undisturbed, NEW, NEVER)
    assert assert_intact(undisturbed) == NEW
    # Each rank's shard; then rank 0's manifest, directory and commit; then the old step's deletion.
    shard, commit, end = (
        r"(write )+fsync ",
        r"write fsync fsync rename fsync ",
        r"rename (unlink )+rmdir ",
    )
    assert re.fullmatch(shard + commit + end, " ".join([*calls[0], ""])), calls
    assert re.fullmatch(shard, " ".join([*calls[1], ""])), calls
    committed = calls[0].index("rename")
    for rank, names in enumerate(calls):
        for call, name in enumerate(names):
            root = shutil.copytree(before, tmp_path / f"rank{rank}-{call}-{name}")
            with pytest.raises(
                RankError, match=f"rank {rank} died with exit code -9|connection|Connection"
            ):
                run_ranks(2, save, root, NEW, (rank, call))
            assert assert_intact(root) == (NEW if rank == 0 and call > committed else OLD), (
                root.name
            )
            remove_partials(root)
            assert len(list(root.iterdir())) == len(list_steps(root)), (
                f"{root.name}: files that belong to no checkpoint"
            )
    print(f"{sum(map(len, calls))} calls: {calls}")
