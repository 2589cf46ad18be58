"""Fault 19: truncated, missing, extra, empty or foreign shards and manifests: no partial load."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dmoe.checkpoint.manifest import step_name
from tests.drills.two_ranks import NEW, OLD, Resumer, copied, original, trained

__all__ = ["original"]
pytestmark = pytest.mark.drills

SHARD = "shard-00002-model-00001-of-00001.safetensors"
"""Shard of rank 1."""


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train another run of the same shapes."""
    return trained(tmp_path_factory.mktemp("other") / "run", "train.seed=1")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the same run in one process."""
    return trained(tmp_path_factory.mktemp("alone") / "run", "parallel.virtual_ranks=2", ranks=1)


@pytest.fixture(scope="module")
def resumer() -> Resumer:
    return Resumer()


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "truncated": lambda newest, _: os.truncate(
        newest / SHARD, (newest / SHARD).stat().st_size // 2
    ),
    "one byte short": lambda newest, _: os.truncate(
        newest / SHARD, (newest / SHARD).stat().st_size - 1
    ),
    "missing": lambda newest, _: (newest / SHARD).unlink(),
    "empty": lambda newest, _: (newest / SHARD).write_bytes(b""),
    "extra": lambda newest, _: shutil.copy(
        newest / SHARD, newest / SHARD.replace("00002", "00003")
    ),
    "of another run": lambda newest, other: shutil.copy(other / SHARD, newest / SHARD),
    "of the step before": lambda newest, _: shutil.copy(
        newest.with_name(step_name(OLD)) / SHARD, newest / SHARD
    ),
    "two for one": lambda newest, _: shutil.copy(
        newest / SHARD, newest / SHARD.replace("00002", "00001")
    ),
}
FILE = {"extra": SHARD.replace("00002", "00003"), "two for one": SHARD.replace("00002", "00001")}
"""Expected file in the message, if it is not `SHARD`."""


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_shard_falls_back_without_a_partial_load(
    damage: str, original: Path, other: Path, resumer: Resumer, tmp_path: Path
) -> None:
    with copied(original, tmp_path) as run:
        newest = run / "checkpoints" / step_name(NEW)
        DAMAGE[damage](newest, other / "checkpoints" / step_name(NEW))
        resumer.assert_falls_back(run, FILE.get(damage, SHARD))
        shutil.rmtree(newest.with_name(step_name(OLD)))
        resumer.assert_refuses(run, FILE.get(damage, SHARD))


def test_a_manifest_of_another_world_size(
    original: Path, alone: Path, resumer: Resumer, tmp_path: Path
) -> None:
    """A manifest of one process has no shard of rank 1 and another hash for rank 0."""
    with copied(original, tmp_path) as run:
        newest = run / "checkpoints" / step_name(NEW)
        shutil.copy(
            alone / "checkpoints" / step_name(NEW) / "manifest.json", newest / "manifest.json"
        )
        resumer.assert_falls_back(run, "shard-0000")
        shutil.rmtree(newest.with_name(step_name(OLD)))
        resumer.assert_refuses(run, "shard-0000")
