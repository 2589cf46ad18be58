"""A damaged or forged checkpoint is an error that names the file; no tensor is changed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dmoe.checkpoint import load, read_manifest, save, verify
from dmoe.checkpoint.manifest import MANIFEST, Manifest, TensorEntry, hash_file, write
from dmoe.config.errors import CheckpointError
from tests.checkpoint.states import full_state, ones_like, states_equal

SHARD = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save(tmp_path, 100, full_state(), {"tokens": 123456, "note": "text"})


def refused(path: Path, message: str) -> None:
    """Assert that `verify` and `load` refuse, and that `load` leaves the state unchanged."""
    with pytest.raises(CheckpointError, match=message):
        verify(path)
    state = {name: ones_like(tensor) for name, tensor in full_state().items()}
    with pytest.raises(CheckpointError, match=message):
        load(path, state)
    assert states_equal(state, {name: ones_like(tensor) for name, tensor in full_state().items()})


def test_every_one_of_40_random_bit_flips_is_detected(path: Path) -> None:
    """torch's DCP loads 198 of 200 such flips without an error."""
    dice = random.Random(7)
    for number in range(40):
        file = sorted(path.iterdir())[number % 2]
        good = file.read_bytes()
        bad = bytearray(good)
        bit = dice.randrange(8 * len(bad))
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        refused(path, file.name)
        file.write_bytes(good)
    verify(path)


def test_every_bit_of_a_manifest_counts(path: Path) -> None:
    """Also white space, digits in `extra`, and the case bit of letters in the digest."""
    file = path / MANIFEST
    good = file.read_bytes()
    for position in range(0, len(good), 3):
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            read_manifest(path)


def truncate(path: Path) -> None:
    os.truncate(path / SHARD, (path / SHARD).stat().st_size - 1)


def grow(path: Path) -> None:
    with open(path / SHARD, "ab") as file:
        file.write(b"\0")


def remove_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def link_shard(path: Path) -> None:
    (path / SHARD).rename(path.parent / "elsewhere")
    (path / SHARD).symlink_to(path.parent / "elsewhere")


def link_manifest(path: Path) -> None:
    (path / MANIFEST).rename(path.parent / "elsewhere")
    (path / MANIFEST).symlink_to(path.parent / "elsewhere")


def pipe_manifest(path: Path) -> None:
    """Opening a pipe for reading would block until there is a writer."""
    (path / MANIFEST).unlink()
    os.mkfifo(path / MANIFEST)


def pipe_shard(path: Path) -> None:
    (path / SHARD).unlink()
    os.mkfifo(path / SHARD)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, rf"{SHARD} has \d+ bytes, not"),
        (grow, rf"{SHARD} has \d+ bytes, not"),
        (lambda path: (path / SHARD).write_bytes(b""), rf"{SHARD} has 0 bytes"),
        (lambda path: (path / SHARD).unlink(), f"{SHARD} is missing"),
        (
            lambda path: (path / "shard-00002-model-00001-of-00001.safetensors").write_bytes(b""),
            "shard-00002.* is extra",
        ),
        (lambda path: (path / ".metadata").write_bytes(b"x"), r"'\.metadata', which is not a"),
        (lambda path: (path / "sub").mkdir(), "sub is not a regular file"),
        (lambda path: (path / MANIFEST).write_bytes(b""), r"manifest\.json"),
        (remove_manifest, r"manifest\.json cannot be read"),
        (link_shard, f"{SHARD} is not a regular file"),
        (link_manifest, r"manifest\.json"),
        (pipe_shard, f"{SHARD} is not a regular file"),
        (pipe_manifest, r"manifest\.json"),
    ],
)
def test_damage_names_the_file(path: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(path)
    refused(path, message)


def test_read_manifest_follows_no_link(path: Path) -> None:
    link_manifest(path)
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        read_manifest(path)


def test_a_shard_of_another_step_is_refused(path: Path) -> None:
    other = {
        name: tensor + 1 if tensor.is_floating_point() else tensor
        for name, tensor in full_state().items()
    }
    newer = save(path.parent, 200, other, {})
    (path / SHARD).write_bytes((newer / SHARD).read_bytes())
    refused(path, f"{SHARD} was changed")


def test_a_checkpoint_directory_that_is_a_link_or_was_renamed(path: Path) -> None:
    path.rename(path.with_name("step-00000300"))
    refused(
        path.with_name("step-00000300"),
        "is of step 100, not of the step in its directory's name",
    )
    path.symlink_to(path.with_name("step-00000300"))
    refused(path, "links are not followed")


def forge(path: Path, change: Callable[[dict], object]) -> None:
    """Write a changed manifest with a correct digest."""
    body = json.loads((path / MANIFEST).read_text())["manifest"]
    changed = change(body)
    body = body if changed is None else changed
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    (path / MANIFEST).write_text(json.dumps({"sha256": digest, "manifest": body}, indent=1) + "\n")


def put_file(name: str) -> Callable[[dict], None]:
    def change(body: dict) -> None:
        body["files"][name] = body["files"].pop(SHARD)

    return change


def put(section: str, value: object) -> Callable[[dict], None]:
    def change(body: dict) -> None:
        body[section] = value

    return change


def test_the_forger_of_these_tests_can_forge(path: Path) -> None:
    forge(path, lambda body: body["extra"].update(note="forged"))
    assert verify(path).extra["note"] == "forged"


@pytest.mark.parametrize(
    "change",
    [
        put_file("../step-00000100/" + SHARD),
        put_file("/etc/passwd"),
        put_file(".."),
        put_file(""),
        put_file("a\0b"),
        put_file("manifest.json"),
        put("format", 2),
        put("format", True),
        put("step", -1),
        put("step", "100"),
        put("step", 2**70),
        put("files", []),
        put("files", {SHARD: {"size": 1}}),
        put("files", {SHARD: {"size": 1, "sha256": ["a"] * 64}}),
        put("files", {SHARD: {"size": True, "sha256": "a" * 64}}),
        put("tensors", 3),
        put("tensors", {"x": {"shape": [-1], "dtype": "float32"}}),
        put("tensors", {"x": {"shape": "33", "dtype": "float32"}}),
        put("tensors", {"x": {"shape": [3], "dtype": None}}),
        put("extra", None),
        put("unknown", 1),
        lambda body: [],
        lambda body: {},
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(
    path: Path, change: Callable[[dict], object]
) -> None:
    forge(path, change)
    refused(path, r"manifest\.json")


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "[]",
        "{",
        "[" * 100_000,
        '{"manifest": 1e999}',
        "1" * 5000,
        "\ufeff{}",
        '"\\ud800"',
        "\0",
    ],
)
def test_a_manifest_that_is_not_json_is_refused(path: Path, text: str) -> None:
    (path / MANIFEST).write_text(text)
    refused(path, r"manifest\.json")


def test_300_malformed_headers_are_checkpoint_errors(tmp_path: Path) -> None:
    """The manifest's hashes match the malformed file, so the header parsers must refuse it."""
    good = (save(tmp_path / "good", 1, full_state(), {}) / SHARD).read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    dice, path, refusals = random.Random(3), tmp_path / "step-00000001", 0
    contents = read_manifest(tmp_path / "good" / "step-00000001").tensors
    path.mkdir()
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(dice.randrange(1, 6)):
            bad[dice.randrange(8 + length)] = dice.choice(b'\0\xff0123456789{}[],:"- aFIB')
        (path / SHARD).write_bytes(bad)
        (path / MANIFEST).unlink(missing_ok=True)
        write(path, Manifest(1, {SHARD: hash_file(path / SHARD)}, contents, {}))
        state = {name: ones_like(tensor) for name, tensor in full_state().items()}
        try:
            load(path, state)
        except CheckpointError:
            refusals += 1
            assert states_equal(
                state, {name: ones_like(tensor) for name, tensor in full_state().items()}
            )
    # The others changed an insignificant byte, such as white space or a digit of the metadata.
    assert refusals > 200


def write_shard(
    path: Path, chunks: dict[str, torch.Tensor], offsets: dict[str, list[int]], shape: tuple
) -> None:
    info = json.dumps({name: {"saved_offsets": offset} for name, offset in offsets.items()})
    path.mkdir()
    save_file(chunks, path / SHARD, metadata={"DCP_SHARDING_INFO": info})
    files = {SHARD: hash_file(path / SHARD)}
    write(path, Manifest(1, files, {"x": TensorEntry(shape, "float32")}, {}))


@pytest.mark.parametrize(
    ("chunk", "offset", "message"),
    [
        (torch.ones(2, 3), [0, 0], "hold 6 of the 12 elements of 'x'"),
        (torch.ones(4, 3), [1, 0], "outside its shape"),
        (torch.ones(4, 3), [-1, 0], "outside its shape"),
        (torch.ones(4, 3), [0], "outside its shape"),
        (
            torch.ones(4, 3, dtype=torch.float64),
            [0, 0],
            "'x' is float64 here and float32 in the manifest",
        ),
    ],
)
def test_chunks_that_do_not_cover_the_tensor_are_refused(
    tmp_path: Path, chunk: torch.Tensor, offset, message: str
) -> None:
    """torch's reader would leave the missing rows unchanged without an error."""
    write_shard(tmp_path / "step-00000001", {"x": chunk}, {"x": offset}, (4, 3))
    target = torch.zeros(4, 3)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "step-00000001", {"x": target})
    assert not target.any()


def test_a_tensor_that_no_file_holds_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "step-00000001", {}, {}, (0, 3))
    with pytest.raises(CheckpointError, match=r"no file of .* holds 'x'"):
        load(tmp_path / "step-00000001", {"x": torch.zeros(0, 3)})
