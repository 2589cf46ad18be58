"""The newest intact checkpoint, and pruning."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch

from dmoe.checkpoint import directory, find_latest, latest, list_steps, load, prune, save
from dmoe.config.errors import CheckpointError

STATE = {"w": torch.arange(6.0)}


def make(root: Path, *steps: int) -> list[Path]:
    return [save(root, step, STATE, {"step": step}) for step in steps]


def flip(path: Path) -> None:
    """Flip one bit of the tensor data: names, sizes and header stay correct."""
    (shard,) = path.glob("shard-*")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def cut(path: Path) -> None:
    (shard,) = path.glob("shard-*")
    os.truncate(shard, shard.stat().st_size - 1)


def steps_of(root: Path) -> list[int]:
    return [step for step, _ in list_steps(root)]


def test_order_is_by_step_and_not_by_clock(tmp_path: Path) -> None:
    """A clock set back, or a step of more digits, must not make an old step the newest."""
    paths = make(tmp_path, 100, 20, 123_456_789, 99_999_999)
    for age, path in enumerate(paths):
        os.utime(path, (1000.0 - age, 1000.0 - age))
    assert steps_of(tmp_path) == [20, 100, 99_999_999, 123_456_789]
    assert latest(tmp_path) == paths[2]


def test_only_exact_names_that_are_directories_count(tmp_path: Path) -> None:
    (good,) = make(tmp_path, 7)
    for name in (
        "step-8",
        "step-000000009",
        "step-00000010.tmp",
        "step-00000011.old",
        "xstep-00000012",
        "step-٠٠٠٠٠٠١٣",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000014").write_text("a file")
    (tmp_path / "step-00000015").symlink_to(good)
    assert list_steps(tmp_path) == [(7, good)]
    assert latest(tmp_path) == good


def test_no_directory_and_an_empty_one_hold_no_checkpoint(tmp_path: Path) -> None:
    assert list_steps(tmp_path / "none") == []
    assert latest(tmp_path / "none") is None
    assert latest(tmp_path) is None
    assert prune(tmp_path / "none", 1) == []


@pytest.mark.parametrize("damage", [flip, cut])
def test_latest_falls_back_one_step_with_one_warning(tmp_path: Path, damage) -> None:
    paths = make(tmp_path, 100, 200, 300)
    damage(paths[2])
    with pytest.warns(
        UserWarning, match=r"falling back to step-00000200: .*step-00000300/shard-00001"
    ) as caught:
        assert latest(tmp_path) == paths[1]
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="falling back") as caught:
        assert find_latest(tmp_path) == paths[1]
    assert len(caught) == 1


def test_a_good_latest_warns_of_nothing_older(tmp_path: Path) -> None:
    paths = make(tmp_path, 100, 200)
    flip(paths[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latest(tmp_path) == paths[1]


def test_no_intact_checkpoint_is_an_error(tmp_path: Path) -> None:
    """None would mean to start again and overwrite the run."""
    for path in make(tmp_path, 100, 200):
        flip(path)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint .* is intact: .*step-00000200.*step-00000100"
    ):
        latest(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        find_latest(tmp_path)


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    paths = make(tmp_path, 1, 2, 3, 4)
    assert prune(tmp_path, 2) == [paths[1], paths[0]]
    assert steps_of(tmp_path) == [3, 4]
    assert prune(tmp_path, 2) == []
    assert prune(tmp_path, 5) == []
    assert steps_of(tmp_path) == [3, 4]


def test_prune_counts_complete_ones_only(tmp_path: Path) -> None:
    """accelerate deletes the old one before it writes the new one: three failures leave none."""
    paths = make(tmp_path, 1, 2, 3, 4, 5)
    for path in paths[2:]:
        cut(path)
    (tmp_path / "step-00000006.tmp").mkdir()
    (tmp_path / "step-00000006.tmp" / "shard").write_text("x")
    (tmp_path / "step-00000007").mkdir()
    assert prune(tmp_path, 2) == [tmp_path / "step-00000006.tmp"]
    assert latest_quietly(tmp_path) == paths[1]
    assert prune(tmp_path, 1) == [paths[0]]
    assert latest_quietly(tmp_path) == paths[1]


def latest_quietly(root: Path) -> Path | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return latest(root)


def test_prune_never_deletes_the_only_good_one(tmp_path: Path) -> None:
    """A newest checkpoint with a flipped bit looks complete until it is hashed."""
    paths = make(tmp_path, 1, 2, 3)
    flip(paths[2])
    flip(paths[1])
    with pytest.warns(UserWarning, match="nothing is pruned") as caught:
        assert prune(tmp_path, 2) == []
    assert len(caught) == 1
    assert steps_of(tmp_path) == [1, 2, 3]
    assert latest_quietly(tmp_path) == paths[0]


def test_prune_to_nothing_is_refused(tmp_path: Path) -> None:
    make(tmp_path, 1)
    with pytest.raises(CheckpointError, match="keep=0"):
        prune(tmp_path, 0)
    assert steps_of(tmp_path) == [1]


def test_prune_removes_links_and_not_what_they_point_to(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    root = tmp_path / "checkpoints"
    make(root, 1)
    (root / "step-00000002.tmp").symlink_to(outside)
    (root / "step-00000003.tmp").mkdir()
    (root / "step-00000003.tmp" / "link").symlink_to(outside)
    prune(root, 1)
    assert (outside / "precious").read_text() == "x"
    assert sorted(entry.name for entry in root.iterdir()) == ["step-00000001"]


def test_a_deletion_cut_short_leaves_no_damaged_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make(tmp_path, 1, 2)

    def killed(path: Path) -> None:
        next(Path(path).iterdir()).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(directory.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, 1)
    monkeypatch.undo()
    assert list_steps(tmp_path) == [(2, paths[1])]
    assert prune(tmp_path, 1) == [tmp_path / "step-00000001.tmp"]
    assert load(paths[1], {"w": torch.zeros(6)}) == {"step": 2}
