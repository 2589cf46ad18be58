"""Saves in a writer thread: the same bytes as without, whatever training does meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dmoe.checkpoint import AsyncSaver, list_steps, save_load, verify
from dmoe.checkpoint.validate import local_tensor
from dmoe.distributed.init import set_timeouts
from dmoe.distributed.mesh import build_mesh
from tests.checkpoint.helpers import call_after, constant_state, loaded_value, patched, saved_steps
from tests.checkpoint.states import full_state, sharded_state
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks


def written_twice(rank: int, world: int, root: Path, ep: int) -> list[dict[str, Any]]:
    group = build_mesh(ep, torch.device("cpu")).checkpoint_group
    found = []
    for name, asynchronous in (("foreground", False), ("background", True)):
        state, extra, trained = (
            sharded_state(world, ep) if world > 1 else full_state(),
            {"tokens": [1, 2]},
            threading.Event(),
        )
        state["strided"] = torch.arange(12.0).reshape(3, 4).t()
        state["tied"] = state["model.embed"]
        saver = AsyncSaver(root / name, 2, group, asynchronous)
        with patched(
            save_load,
            "save",
            call_after(trained, save_load.save) if asynchronous else save_load.save,
        ):
            for step in (1, 2):  # the second reuses the first one's buffers
                trained.clear()
                for tensor in state.values():
                    local_tensor(tensor).add_(step) if tensor.dtype != torch.bool else local_tensor(
                        tensor
                    ).logical_not_()
                saver.save(step, state, extra | {"step": step})
                before = {key: local_tensor(tensor).clone() for key, tensor in state.items()}
                for tensor in state.values():
                    local_tensor(tensor).zero_()
                extra["tokens"].append(step)
                trained.set()
                saver.wait()
                extra["tokens"].pop()
                for key, tensor in state.items():
                    local_tensor(tensor).copy_(before[key])
        saver.close()
        found.append(
            {
                step: (verify(path).files, verify(path).extra)
                for step, path in list_steps(root / name)
            }
        )
    return found


@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 2), (4, 2)])
def test_the_writer_thread_saves_the_state_of_the_call(tmp_path: Path, world: int, ep: int) -> None:
    """Training changes tensors and `extra` before the writer starts; all hashes stay equal."""
    for foreground, background in run_ranks(world, written_twice, tmp_path, ep):
        assert sorted(foreground) == [1, 2]
        assert foreground == background
        assert foreground[1] != foreground[2]


def test_the_next_save_waits_for_the_last_and_does_not_write_into_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, original = [], save_load.save

    def slow(root: Path, step: int, *args: Any, **kwargs: Any) -> Path:
        events.append(f"begin {step}")
        time.sleep(0.2)
        path = original(root, step, *args, **kwargs)
        events.append(f"end {step}")
        return path

    monkeypatch.setattr(save_load, "save", slow)
    saver, state = AsyncSaver(tmp_path, 3, None, True), constant_state(0.0)
    for step in (1, 2, 3):
        state["w"].fill_(step)
        saver.save(step, state, {})
    saver.close()
    assert events == ["begin 1", "end 1", "begin 2", "end 2", "begin 3", "end 3"]
    assert [loaded_value(path) for _, path in list_steps(tmp_path)] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_finished_saves_are_reported_once(tmp_path: Path, asynchronous: bool) -> None:
    saver = AsyncSaver(tmp_path, 2, None, asynchronous)
    assert saver.take_finished() == []
    for step in (1, 2, 3):
        saver.save(step, constant_state(step), {})
    saver.close()
    done = saver.take_finished()
    assert [saved.step for saved in done] == [1, 2, 3]
    assert all(0 <= saved.blocking_seconds <= saved.seconds for saved in done)
    (shard,) = (tmp_path / "step-00000003").glob("shard-*")
    assert done[2].bytes == shard.stat().st_size
    assert saver.take_finished() == []
    assert saved_steps(tmp_path) == [2, 3]


# --- the group, and the way out


def slow_disk(rank: int, world: int, root: Path) -> bool:
    mesh = build_mesh(world, torch.device("cpu"), timeout=50.0)
    set_timeouts(mesh.step_groups(), 0.3)
    if rank == 1:
        time.sleep(1.0)
    AsyncSaver(root, 1, mesh.checkpoint_group, False).save(1, sharded_state(world, world), {})
    set_timeouts(mesh.step_groups(), 50.0)
    return mesh.checkpoint_group not in mesh.step_groups()


def test_a_slow_disk_does_not_time_out(tmp_path: Path) -> None:
    """`set_timeouts` is for the groups of a step: a rank that needs longer to write is not dead."""
    assert run_ranks(2, slow_disk, tmp_path) == [True, True]


def test_drain_does_not_wait_forever_and_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    monkeypatch.setattr(save_load, "save", call_after(go, save_load.save))
    saver = AsyncSaver(tmp_path, 1, None, True)
    saver.save(7, constant_state(7.0), {})
    with pytest.warns(UserWarning, match="save-7 .* was not finished"):
        saver.drain(0.05)
    go.set()
    saver.drain()
    assert saved_steps(tmp_path) == [7]


LEFT_BEHIND = """
import sys, time, torch, torch.distributed as dist
from pathlib import Path
from datetime import timedelta
from dmoe.checkpoint import AsyncSaver
from dmoe.distributed.mesh import build_mesh

root, rank = Path(sys.argv[1]), int(sys.argv[2])
store, limit = dist.FileStore(str(root / "store"), 2), timedelta(seconds=50)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
mesh = build_mesh(2, torch.device("cpu"), 50.0)
if rank == 1:
    time.sleep(60)
saver = AsyncSaver(root / "checkpoints", 1, mesh.checkpoint_group, True)
saver.save(1, {"w": torch.ones(3)}, {})
saver.drain(0.1)
sys.exit(4)
"""


def test_a_process_leaves_with_its_own_code_while_a_frozen_peer_keeps_its_writer(
    tmp_path: Path,
) -> None:
    """An ordinary thread would keep the process until the group's time-out."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LEFT_BEHIND, str(tmp_path)]
    peer = subprocess.Popen([*command, "1"], env=environment)
    try:
        ended = subprocess.run(
            [*command, "0"], env=environment, capture_output=True, text=True, timeout=40
        )
    finally:
        peer.kill()
        peer.wait()
    assert ended.returncode == 4, ended.stderr
    assert "was not finished" in ended.stderr
