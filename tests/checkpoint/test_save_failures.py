"""A save that fails at any point leaves the previous checkpoint and nothing else."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch

from dmoe.checkpoint import dcp, latest, list_steps, load, save, verify
from dmoe.checkpoint.dcp import Chunk
from dmoe.config.errors import CheckpointError

OLD, NEW = {"w": torch.arange(6.0)}, {"w": torch.arange(6.0) + 100}


class Killed(BaseException):
    """Simulates SIGKILL: no handler of the code under test completes."""


class Disk:
    """Counts the calls that make a save durable; fails the chosen one, before or after it."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        call: int | None,
        error: BaseException | None,
        *,
        after: bool = False,
    ):
        self.calls, self.call, self.error, self.after = 0, call, error, after
        for name in (
            "fsync",
            "rename",
        ):  # a directory that exists is fine, so pathlib swallows a failing mkdir
            monkeypatch.setattr(os, name, self.broken(getattr(os, name)))

    def broken(self, function):
        def call(*args, **kwargs):
            mine = self.calls == self.call
            self.calls += 1
            if mine and not self.after:
                raise self.error
            result = function(*args, **kwargs)
            if mine:
                raise self.error
            return result

        return call


def count(root: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    with monkeypatch.context() as patch:
        disk = Disk(patch, None, None)
        save(root, 1, NEW, {})
    return disk.calls


def test_each_durable_call_that_fails_fails_the_save_and_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = count(tmp_path / "count", monkeypatch)
    assert total == 5  # fsync of shard, manifest and directory, rename, fsync of the parent
    for call in range(total):
        root = tmp_path / f"run{call}"
        old = save(root, 100, OLD, {})
        with monkeypatch.context() as patch:
            Disk(patch, call, OSError(28, "No space left on device"))
            with pytest.raises(CheckpointError, match="No space left on device"):
                save(root, 200, NEW, {})
        names = sorted(entry.name for entry in root.iterdir())
        # The new one exists after the rename; the last call is the fsync of the parent.
        assert names == (
            ["step-00000100", "step-00000200"] if call == total - 1 else ["step-00000100"]
        )
        verify(old)
        if call < total - 1:
            verify(save(root, 200, NEW, {}))


@pytest.mark.parametrize("after", [False, True])
def test_each_durable_call_that_is_killed_leaves_the_old_or_the_new_one(
    tmp_path: Path, monkeypatch, after: bool
) -> None:
    total, outcomes = count(tmp_path / "count", monkeypatch), set()
    for call in range(total):
        root = tmp_path / f"run{call}"
        save(root, 100, OLD, {})
        with monkeypatch.context() as patch:
            Disk(patch, call, Killed(), after=after)
            # torch's DCP converts even a BaseException of the writer into an ordinary error.
            with pytest.raises((Killed, CheckpointError)):
                save(root, 200, NEW, {})
        newest = latest(root)
        state = {"w": torch.zeros(6)}
        load(newest, state)
        assert torch.equal(
            state["w"], {"step-00000100": OLD, "step-00000200": NEW}[newest.name]["w"]
        )
        outcomes.add(newest.name)
        if newest.name == "step-00000100":  # and the next save clears what the killed one left
            save(root, 200, NEW, {})
            assert sorted(entry.name for entry in root.iterdir()) == [
                "step-00000100",
                "step-00000200",
            ]
    assert outcomes == {"step-00000100", "step-00000200"}


def test_a_full_disk_in_the_middle_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's DCP drops errors of writer threads; here the calling thread writes."""
    old, original = save(tmp_path, 100, OLD, {}), dcp._write

    def full(file: io.FileIO, data: memoryview) -> None:
        if file.tell():  # the header still fits
            raise OSError(28, "No space left on device")
        original(file, data)

    monkeypatch.setattr(dcp, "_write", full)
    with pytest.raises(
        CheckpointError, match=r"writing .*step-00000200\.tmp failed: .*No space left on device"
    ):
        save(tmp_path, 200, NEW, {})
    assert list_steps(tmp_path) == [(100, old)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000100"]


def test_a_writer_that_drops_a_tensor_without_an_error_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = dcp.write_safetensors

    def lossy(path: Path, given: list[Chunk], metadata: dict[str, str]) -> None:
        original(path, [chunk for chunk in given if chunk.name != "v"], metadata)

    monkeypatch.setattr(dcp, "write_safetensors", lossy)
    with pytest.raises(CheckpointError, match=r"no file of .* holds 'v'"):
        save(tmp_path, 1, {"w": torch.ones(2), "v": torch.ones(2)}, {})
    assert list(tmp_path.iterdir()) == []


def test_an_intact_step_is_not_overwritten_and_a_damaged_one_is(tmp_path: Path) -> None:
    path = save(tmp_path, 100, OLD, {})
    with pytest.raises(CheckpointError, match="step-00000100 already exists and is intact"):
        save(tmp_path, 100, NEW, {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000100"]
    state = {"w": torch.zeros(6)}
    load(path, state)
    assert torch.equal(state["w"], OLD["w"])
    (path / "manifest.json").write_text("{}")
    load(save(tmp_path, 100, NEW, {}), state)
    assert torch.equal(state["w"], NEW["w"])


def test_a_stale_partial_is_cleared_and_a_link_in_its_place_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    root = tmp_path / "checkpoints"
    root.mkdir()
    (root / "step-00000001.tmp").symlink_to(outside)
    (root / "step-00000002.tmp").mkdir()
    (root / "step-00000002.tmp" / "shard-00009-model-00001-of-00001.safetensors").write_text(
        "stale"
    )
    for step in (1, 2):
        verify(save(root, step, OLD, {}))
    assert sorted(entry.name for entry in outside.iterdir()) == ["precious"]
    assert sorted(entry.name for entry in root.iterdir()) == ["step-00000001", "step-00000002"]
