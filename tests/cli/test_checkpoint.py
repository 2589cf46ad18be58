"""`dmoe checkpoint inspect|verify`: what is in it, and is it whole."""

from __future__ import annotations

import json
import shutil
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dmoe.checkpoint import read_manifest, save
from dmoe.config.errors import CheckpointError, ConfigError
from dmoe.train.checkpoint_info import find, inspect, newest, verify
from tests.checkpoint.experts import whole
from tests.cli.commands import dmoe, refused
from tests.cli.conftest import Run

SHARD = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two checkpoints that were saved without a run around them, and a save that was cut short."""
    for step in (5, 10):
        save(tmp_path / "checkpoints", step, whole(), {"note": "text"})
    (tmp_path / "checkpoints" / "step-00000015.tmp").mkdir()
    return tmp_path / "checkpoints"


@pytest.fixture
def broken(pair: Run, tmp_path: Path) -> Path:
    """A copy of a run on two ranks."""
    shutil.copytree(pair.path, tmp_path / "run")
    return tmp_path / "run"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def as_json(*arguments: str, cwd: Path, code: int = 0) -> dict[str, Any]:
    result = dmoe("checkpoint", *arguments, "--json", cwd=cwd)
    assert result.returncode == code, result.stderr
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def test_inspect_says_what_a_run_on_two_ranks_saved(pair: Run) -> None:
    path = pair.path / "checkpoints" / "step-00000006"
    contents, manifest = inspect(path), read_manifest(path)
    assert (contents.step, contents.tokens) == (6, 6 * 8 * 16)
    assert contents.topology == {"world": 2, "ep": 2, "virtual_ranks": 1, "micro_batch": 4}
    assert contents.versions["torch"] == torch.__version__
    assert contents.data == manifest.extra["data"]
    assert list(contents.layers.values()) == [8, 8]
    assert contents.tensors == len(manifest.tensors)
    assert contents.problem is None
    assert (
        contents.bytes_by_kind["moments"]
        == 2 * contents.bytes_by_kind["weights"]
        == 8 * contents.parameters
    )
    assert sum(contents.bytes_by_kind.values()) == sum(contents.bytes_by_dtype.values())


def test_bytes_are_those_of_the_tensors(root: Path) -> None:
    contents = inspect(root / "step-00000010")
    held = sum(tensor.numel() * tensor.element_size() for tensor in whole().values())
    assert sum(contents.bytes_by_kind.values()) == sum(contents.bytes_by_dtype.values()) == held
    assert contents.bytes_by_dtype["bfloat16"] == 2 * whole()["optim.experts.w.exp_avg"].numel()


def test_parameters_are_those_of_the_model(pair: Run, place: Path, small: tuple[str, ...]) -> None:
    content = json.loads(dmoe("explain", *small, "--json", cwd=place).stdout)
    assert (
        inspect(pair.path / "checkpoints" / "step-00000006").parameters
        == content["size"]["numbers"]["parameters"]
    )


def test_who_owned_what_is_what_the_files_hold(pair: Run) -> None:
    path = pair.path / "checkpoints" / "step-00000006"
    contents = inspect(path)
    assert [(owner["ep_rank"], owner["ranks"], owner["experts"]) for owner in contents.owners] == [
        (0, [0], [0, 1, 2, 3]),
        (1, [1], [4, 5, 6, 7]),
    ]
    assert [shard.experts for shard in contents.files] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for shard in contents.files:
        with safe_open(str(path / shard.name), framework="pt") as file:
            assert {piece.name: piece.shape for piece in shard.pieces} == {
                name: tuple(file.get_slice(name).get_shape())
                for name in file.keys()  # noqa: SIM118
            }
    elements = sum(prod(piece.shape) for shard in contents.files for piece in shard.pieces)
    assert elements == sum(prod(entry.shape) for entry in read_manifest(path).tensors.values())


def test_inspect_prints_it(pair: Run, place: Path) -> None:
    result = dmoe("checkpoint", "inspect", "runs/latest", cwd=place)
    assert (result.returncode, result.stderr) == (0, "")
    for words in (
        "runs/latest/checkpoints/step-00000006",
        "world 2, ep 2",
        "2 x 8 experts",
        "experts 4-7; rank 1",
        SHARD,
        "checkpoints: step-00000003, step-00000006",
        "whole, by names and sizes",
    ):
        assert words in result.stdout


def test_json_says_the_same(pair: Run, place: Path) -> None:
    content = as_json("inspect", "runs/latest", cwd=place)
    assert [Path(path).name for path in content["checkpoints"]] == [
        "step-00000003",
        "step-00000006",
    ]
    contents = inspect(pair.path / "checkpoints" / "step-00000006")
    assert content["checkpoint"]["owners"] == contents.owners
    assert content["checkpoint"]["bytes_by_kind"] == contents.bytes_by_kind
    assert [len(file["pieces"]) for file in content["checkpoint"]["files"]] == [
        len(file.pieces) for file in contents.files
    ]


def test_verify_reads_every_checkpoint(root: Path) -> None:
    content = as_json("verify", str(root.parent), cwd=root)
    assert content["ok"]
    assert [proof["step"] for proof in content["checkpoints"]] == [5, 10]
    assert all(proof["problem"] is None and proof["bytes"] > 0 for proof in content["checkpoints"])
    assert [Path(path).name for path in content["partial"]] == ["step-00000015.tmp"], (
        "listed, and no error"
    )


def test_verify_names_the_file_that_was_changed(broken: Path) -> None:
    """One bit, which names and sizes cannot show."""
    flip(broken / "checkpoints" / "step-00000003" / SHARD)
    assert inspect(broken / "checkpoints" / "step-00000003").problem is None
    result = dmoe("checkpoint", "verify", str(broken), cwd=broken)
    assert result.returncode == 3
    assert "step-00000003/" + SHARD + " was changed after it was written" in result.stdout
    assert "1 of 2 not whole" in result.stdout
    content = as_json("verify", str(broken / "checkpoints"), cwd=broken, code=3)
    assert [proof["problem"] is None for proof in content["checkpoints"]] == [False, True]
    assert as_json("verify", str(broken / "checkpoints" / "step-00000006"), cwd=broken)["ok"]


def test_inspect_takes_the_newest_whole_one_and_shows_a_damaged_one_if_asked(broken: Path) -> None:
    (broken / "checkpoints" / "step-00000006" / SHARD).unlink()
    assert newest(find(str(broken))).name == "step-00000003"
    result = dmoe(
        "checkpoint", "inspect", str(broken / "checkpoints" / "step-00000006"), cwd=broken
    )
    assert result.returncode == 3
    assert (
        f"DAMAGED: {broken / 'checkpoints' / 'step-00000006' / SHARD} is missing" in result.stdout
    )


def test_a_manifest_that_cannot_be_read_is_one_sentence(broken: Path) -> None:
    path = broken / "checkpoints" / "step-00000006"
    (path / "manifest.json").write_text("{", encoding="utf-8")
    refused(
        dmoe("checkpoint", "inspect", str(path), cwd=broken), "step-00000006/manifest.json", code=3
    )
    proof = verify(path)
    assert proof.step == 6
    assert proof.problem is not None
    assert "manifest.json" in proof.problem


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_where_nothing_is(command: str, tmp_path: Path) -> None:
    refused(
        dmoe("checkpoint", command, "nowhere", cwd=tmp_path),
        "RUN=nowhere",
        "is no directory",
        "runs/latest",
    )
    (tmp_path / "run" / "checkpoints" / "step-00000004.tmp").mkdir(parents=True)
    refused(dmoe("checkpoint", command, "run", cwd=tmp_path), "run has no checkpoint yet", code=3)


def test_what_may_be_given(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in (root, root.parent, f"{root}/"):
        assert [path.name for path in find(str(given)).checkpoints] == [
            "step-00000005",
            "step-00000010",
        ]
    assert find(str(root / "step-00000005")).checkpoints == [root / "step-00000005"]
    monkeypatch.chdir(root / "step-00000005")
    assert inspect(find(".").checkpoints[0]).step == 5
    shutil.copytree(root / "step-00000005", root.parent / "kept")
    assert verify(find(str(root.parent / "kept")).checkpoints[0]).step == 5, (
        "also under another name"
    )
    with pytest.raises(CheckpointError, match="its save has not finished"):
        find(str(root / "step-00000015.tmp"))
    (root.parent / "empty").mkdir()
    with pytest.raises(ConfigError, match="neither a run, nor a directory of checkpoints"):
        find(str(root.parent / "empty"))


def test_what_the_saver_did_not_say_is_not_made_up(root: Path) -> None:
    contents = inspect(root / "step-00000010")
    assert (contents.tokens, contents.data, contents.topology, contents.versions) == (
        None,
        None,
        {},
        {},
    )
    result = dmoe("checkpoint", "inspect", str(root), cwd=root)
    assert result.stdout.count("not said") == 4
