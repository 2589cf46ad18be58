"""Fault 21: malicious checkpoints: no code is executed, no file outside the run is touched."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmoe.checkpoint.manifest import MANIFEST, step_name
from tests.drills.two_ranks import NEW, OLD, Resumer, copied, original

__all__ = ["original"]
pytestmark = pytest.mark.drills

SHARD = "shard-00001-model-00001-of-00001.safetensors"


class Payload:
    """Object that creates a directory when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def forge(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and compute its hash again."""
    body = json.loads((checkpoint / MANIFEST).read_text())["manifest"]
    change(body)
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    (checkpoint / MANIFEST).write_text(
        json.dumps({"sha256": digest, "manifest": body}, indent=1) + "\n"
    )


def with_hash_of(checkpoint: Path, name: str) -> Callable[[dict[str, Any]], object]:
    """Return a change of the manifest that records the present content of the file `name`."""
    content = (checkpoint / name).read_bytes()
    return lambda body: body["files"].update(
        {name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    )


@pytest.fixture(scope="module")
def resumer() -> Resumer:
    return Resumer()


@pytest.mark.parametrize("protocol", [0, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize(
    "name", [SHARD, MANIFEST, "shard-00003-model-00001-of-00001.safetensors", ".metadata"]
)
def test_a_pickle_in_any_file_is_not_unpickled(
    name: str, protocol: int, original: Path, resumer: Resumer, tmp_path: Path
) -> None:
    """As a shard, manifest, extra shard or torch's `.metadata`; also with valid hashes."""
    mark, armed = tmp_path / "was-executed", tmp_path / "armed"
    pickle.loads(pickle.dumps(Payload(armed), protocol))  # noqa: S301
    assert armed.is_dir()
    with copied(original, tmp_path) as run:
        newest = run / "checkpoints" / step_name(NEW)
        (newest / name).write_bytes(pickle.dumps(Payload(mark), protocol))
        resumer.assert_falls_back(run, name)
        if name.endswith(".safetensors"):
            forge(newest, with_hash_of(newest, name))
            shutil.rmtree(newest.with_name(step_name(OLD)))
            resumer.assert_refuses(run, name)
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    [
        "../escaped.safetensors",
        "../../escaped.safetensors",
        "/tmp/escaped.safetensors",
        "a/../b",
        "..",
    ],
)
def test_a_name_outside_the_checkpoint_is_refused(
    name: str, original: Path, resumer: Resumer, tmp_path: Path
) -> None:
    with copied(original, tmp_path) as run:
        newest = run / "checkpoints" / step_name(NEW)
        shutil.copy(newest / SHARD, newest.parent / "escaped.safetensors")
        forge(newest, lambda body: body["files"].update({name: body["files"].pop(SHARD)}))
        resumer.assert_falls_back(run, MANIFEST)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("name", [SHARD, MANIFEST])
def test_a_link_is_not_followed(
    name: str, original: Path, resumer: Resumer, tmp_path: Path
) -> None:
    """Not even to a file with the right bytes: the target can change between check and use."""
    outside = tmp_path / "outside"
    outside.mkdir()
    with copied(original, tmp_path) as run:
        newest = run / "checkpoints" / step_name(NEW)
        (newest / name).rename(outside / name)
        (newest / name).symlink_to(outside / name)
        before = snapshot(outside)
        resumer.assert_falls_back(run, name)
        assert snapshot(outside) == before


def test_links_instead_of_checkpoints_are_not_followed_or_emptied(
    original: Path, resumer: Resumer, tmp_path: Path
) -> None:
    """A link is no checkpoint; of a link named like a partial one, only the link is removed."""
    outside = tmp_path / "outside"
    with copied(original, tmp_path) as run:
        checkpoints = run / "checkpoints"
        shutil.copytree(checkpoints / step_name(NEW), outside)
        before = snapshot(outside)
        (checkpoints / step_name(NEW + 4)).symlink_to(outside)
        (checkpoints / f"{step_name(NEW + 8)}.tmp").symlink_to(outside)
        assert resumer.resume(run) == (NEW, [])
        assert snapshot(outside) == before
        assert not (checkpoints / f"{step_name(NEW + 8)}.tmp").is_symlink()
