"""Commands `dmoe checkpoint inspect` and `dmoe checkpoint verify`."""

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
from dmoe.cli.checkpoint.info import (
    find_checkpoints,
    inspect_checkpoint,
    newest_intact,
    verify_checkpoint,
)
from dmoe.config.errors import CheckpointError, ConfigError
from tests.checkpoint.states import full_state
from tests.cli.commands import dmoe, refused
from tests.cli.conftest import Run

pytestmark = pytest.mark.ranks

SHARD = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Save two checkpoints outside a run, and leave an interrupted save."""
    for step in (5, 10):
        save(tmp_path / "checkpoints", step, full_state(), {"note": "text"})
    (tmp_path / "checkpoints" / "step-00000015.tmp").mkdir()
    return tmp_path / "checkpoints"


@pytest.fixture
def copied_run(pair: Run, tmp_path: Path) -> Path:
    """Copy a run on two ranks, to be damaged."""
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


def test_inspect_a_run_on_two_ranks(pair: Run) -> None:
    path = pair.path / "checkpoints" / "step-00000006"
    contents, manifest = inspect_checkpoint(path), read_manifest(path)
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
    contents = inspect_checkpoint(root / "step-00000010")
    expected = sum(tensor.numel() * tensor.element_size() for tensor in full_state().values())
    assert sum(contents.bytes_by_kind.values()) == sum(contents.bytes_by_dtype.values()) == expected
    assert (
        contents.bytes_by_dtype["bfloat16"] == 2 * full_state()["optim.experts.w.exp_avg"].numel()
    )


def test_parameters_are_those_of_the_model(pair: Run, place: Path, small: tuple[str, ...]) -> None:
    content = json.loads(dmoe("explain", *small, "--json", cwd=place).stdout)
    assert (
        inspect_checkpoint(pair.path / "checkpoints" / "step-00000006").parameters
        == content["size"]["numbers"]["parameters"]
    )


def test_owners_match_the_files(pair: Run) -> None:
    path = pair.path / "checkpoints" / "step-00000006"
    contents = inspect_checkpoint(path)
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


def test_inspect_prints_a_table(pair: Run, place: Path) -> None:
    result = dmoe("checkpoint", "inspect", "runs/latest", cwd=place)
    assert (result.returncode, result.stderr) == (0, "")
    for words in (
        "runs/latest/checkpoints/step-00000006",
        "world 2, ep 2",
        "2 x 8 experts",
        "experts 4-7; rank 1",
        SHARD,
        "checkpoints: step-00000003, step-00000006",
        "intact by names and sizes",
    ):
        assert words in result.stdout


def test_json_has_the_same_content(pair: Run, place: Path) -> None:
    content = as_json("inspect", "runs/latest", cwd=place)
    assert [Path(path).name for path in content["checkpoints"]] == [
        "step-00000003",
        "step-00000006",
    ]
    contents = inspect_checkpoint(pair.path / "checkpoints" / "step-00000006")
    assert content["checkpoint"]["owners"] == contents.owners
    assert content["checkpoint"]["bytes_by_kind"] == contents.bytes_by_kind
    assert [len(file["pieces"]) for file in content["checkpoint"]["files"]] == [
        len(file.pieces) for file in contents.files
    ]


def test_verify_reads_every_checkpoint(root: Path) -> None:
    content = as_json("verify", str(root.parent), cwd=root)
    assert content["ok"]
    assert [entry["step"] for entry in content["checkpoints"]] == [5, 10]
    assert all(entry["problem"] is None and entry["bytes"] > 0 for entry in content["checkpoints"])
    assert [Path(path).name for path in content["partial"]] == ["step-00000015.tmp"], (
        "listed, and no error"
    )


def test_verify_names_the_changed_file(copied_run: Path) -> None:
    """One bit is flipped, so names and sizes agree."""
    flip(copied_run / "checkpoints" / "step-00000003" / SHARD)
    assert inspect_checkpoint(copied_run / "checkpoints" / "step-00000003").problem is None
    result = dmoe("checkpoint", "verify", str(copied_run), cwd=copied_run)
    assert result.returncode == 3
    assert "step-00000003/" + SHARD + " was changed after it was written" in result.stdout
    assert "1 of 2 damaged" in result.stdout
    content = as_json("verify", str(copied_run / "checkpoints"), cwd=copied_run, code=3)
    assert [entry["problem"] is None for entry in content["checkpoints"]] == [False, True]
    assert as_json("verify", str(copied_run / "checkpoints" / "step-00000006"), cwd=copied_run)[
        "ok"
    ]


def test_inspect_takes_the_newest_intact_checkpoint_or_the_given_one(copied_run: Path) -> None:
    (copied_run / "checkpoints" / "step-00000006" / SHARD).unlink()
    assert newest_intact(find_checkpoints(str(copied_run))).name == "step-00000003"
    result = dmoe(
        "checkpoint", "inspect", str(copied_run / "checkpoints" / "step-00000006"), cwd=copied_run
    )
    assert result.returncode == 3
    assert (
        f"DAMAGED: {copied_run / 'checkpoints' / 'step-00000006' / SHARD} is missing"
        in result.stdout
    )


def test_an_unreadable_manifest_is_one_sentence(copied_run: Path) -> None:
    path = copied_run / "checkpoints" / "step-00000006"
    (path / "manifest.json").write_text("{", encoding="utf-8")
    refused(
        dmoe("checkpoint", "inspect", str(path), cwd=copied_run),
        "step-00000006/manifest.json",
        code=3,
    )
    verified = verify_checkpoint(path)
    assert verified.step == 6
    assert verified.problem is not None
    assert "manifest.json" in verified.problem


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_path_without_checkpoints(command: str, tmp_path: Path) -> None:
    refused(
        dmoe("checkpoint", command, "nowhere", cwd=tmp_path),
        "RUN=nowhere",
        "is no directory",
        "runs/latest",
    )
    (tmp_path / "run" / "checkpoints" / "step-00000004.tmp").mkdir(parents=True)
    refused(dmoe("checkpoint", command, "run", cwd=tmp_path), "run has no checkpoint yet", code=3)


def test_accepted_paths(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in (root, root.parent, f"{root}/"):
        assert [path.name for path in find_checkpoints(str(given)).checkpoints] == [
            "step-00000005",
            "step-00000010",
        ]
    assert find_checkpoints(str(root / "step-00000005")).checkpoints == [root / "step-00000005"]
    monkeypatch.chdir(root / "step-00000005")
    assert inspect_checkpoint(find_checkpoints(".").checkpoints[0]).step == 5
    shutil.copytree(root / "step-00000005", root.parent / "kept")
    assert (
        verify_checkpoint(find_checkpoints(str(root.parent / "kept")).checkpoints[0]).step == 5
    ), "also under another name"
    with pytest.raises(CheckpointError, match="its save has not finished"):
        find_checkpoints(str(root / "step-00000015.tmp"))
    (root.parent / "empty").mkdir()
    with pytest.raises(ConfigError, match="neither a run, nor a directory of checkpoints"):
        find_checkpoints(str(root.parent / "empty"))


def test_missing_values_are_not_recorded(root: Path) -> None:
    contents = inspect_checkpoint(root / "step-00000010")
    assert (contents.tokens, contents.data, contents.topology, contents.versions) == (
        None,
        None,
        {},
        {},
    )
    result = dmoe("checkpoint", "inspect", str(root), cwd=root)
    assert result.stdout.count("not recorded") == 4
