"""Drill 4: SIGKILL at each call by which one save reaches the disk. The newest whole checkpoint is the old one or the new one.

A process that is killed loses nothing of what it has handed to the kernel. So this proves the order of the calls against every death
of a process; of a power failure it only proves that the fsyncs stand where they should.
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
from tests.checkpoint.experts import blank, sharded, whole
from tests.ranks import run_ranks

pytestmark = pytest.mark.drills

OLD, NEW, NEVER = 100, 200, (-1, -1)


def state_at(step: int) -> Callable[[Tensor], Tensor]:
    """What the numbers of `whole()` have become after so many steps."""
    return lambda tensor: (
        tensor ^ (step == NEW) if tensor.dtype == torch.bool else tensor + (step - OLD)
    )


class Disk:
    """Counts what this process does to the disk, and ends it at call number `fatal`: a write when half of it is done, else before."""

    def __init__(self, fatal: int) -> None:
        self.fatal, self.calls = fatal, list[str]()

    def install(self) -> None:
        """For the rest of this process's life."""
        for name in (
            "fsync",
            "rename",
            "unlink",
            "rmdir",
        ):  # mkdir and open change nothing that a save before has not
            setattr(os, name, self._watched(name, getattr(os, name)))
        builtins.open = self._open(open)  # type: ignore[assignment]

    def reached(self, name: str) -> bool:
        self.calls.append(name)
        return len(self.calls) - 1 == self.fatal

    def _watched(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            if self.reached(name):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **more)

        return call

    def _open(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
            if mode != "xb":
                return original(file, mode, *args, **more)
            raw = WatchedFile(file, self)
            return raw if more.get("buffering") == 0 else io.BufferedWriter(raw)

        return call


class WatchedFile(io.FileIO):
    def __init__(self, path: Path, disk: Disk) -> None:
        super().__init__(path, "xb")
        self.disk = disk

    def write(self, data: Any) -> int:
        if self.disk.reached("write"):
            super().write(memoryview(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write(data)


def save(rank: int, world: int, root: Path, step: int, fatal: tuple[int, int]) -> list[str]:
    """Save, prove, and forget the one before. `fatal`: which rank dies at which of its calls. Returns the calls of this rank."""
    state = sharded(world, 2, state_at(step))
    disk = Disk(fatal[1] if rank == fatal[0] else -1)
    disk.install()
    AsyncSaver(root, keep=1, group=None, asynchronous=False).save(step, state, {"step": step})
    return disk.calls


def assert_whole(root: Path) -> int:
    """Load the newest checkpoint: every bit is that of its step. Returns the step."""
    newest = latest(root)
    assert newest is not None
    state = {name: blank(tensor) for name, tensor in whole().items()}
    step = int(load(newest, state)["step"])
    for name, tensor in whole().items():
        assert torch.equal(state[name], state_at(step)(tensor)), f"{name} in {newest}"
    return step


def test_death_at_any_call_of_a_save_leaves_the_old_or_the_new_step(tmp_path: Path) -> None:
    before = tmp_path / "before"
    run_ranks(2, save, before, OLD, NEVER)
    sound = shutil.copytree(before, tmp_path / "sound")
    calls = run_ranks(2, save, sound, NEW, NEVER)
    assert assert_whole(sound) == NEW
    # Each rank's shard; then rank 0's manifest, its directory, the commit; and only then the old step's end.
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
            assert assert_whole(root) == (NEW if rank == 0 and call > committed else OLD), root.name
            remove_partials(root)
            assert len(list(root.iterdir())) == len(list_steps(root)), (
                f"{root.name}: something is left that is no checkpoint"
            )
    print(f"{sum(map(len, calls))} calls: {calls}")
