"""Files of choices: their layout, whole or not there, and what is refused before a run starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dmoe.config.errors import CheckpointError, ConfigError
from dmoe.replay import ChoiceReader, ChoiceSpec, ChoiceWriter, read_choices, write_choices
from dmoe.replay import writer as writers
from dmoe.replay.writer import list_parts

SPEC = ChoiceSpec(data="d" * 64, seed=1, global_batch=3, seq_len=4, layers=2, experts=8, top_k=2)
TOKENS = 12


def digest(step: int) -> str:
    return f"tokens of step {step}"


def ids(step: int) -> np.ndarray:
    """Return choices in which every step, token and layer has others."""
    first = np.arange(TOKENS * 2).reshape(TOKENS, 2, 1) + 5 * step
    return np.concatenate([first % 8, (first + 1 + step % 7) % 8], -1)


def record(folder: Path, steps: range, first: int = 0, run: str = "runs/a") -> ChoiceWriter:
    writer = ChoiceWriter(folder, SPEC, run, first)
    for step in steps:
        writer.add(step, ids(step), digest(step))
    writer.flush()
    return writer


def stored(folder: Path) -> np.ndarray:
    return np.concatenate([read_choices(path) for path, _, _ in list_parts(folder)])


def expected(steps: range) -> np.ndarray:
    return np.concatenate([ids(step) for step in steps])


def test_a_part_is_what_other_programs_read(tmp_path: Path) -> None:
    record(tmp_path, range(3))
    (path,) = tmp_path.glob("*.safetensors")
    found = load_file(path)
    assert list(found) == ["experts"]
    assert found["experts"].dtype == np.uint8
    np.testing.assert_array_equal(found["experts"], expected(range(3)))


@pytest.mark.parametrize(("experts", "bytes_per_id"), [(255, 1), (256, 2), (65535, 2), (65536, 4)])
def test_ids_take_the_smallest_type_with_room_for_none(experts: int, bytes_per_id: int) -> None:
    spec = replace(SPEC, experts=experts)
    packed = spec.pack(np.array([[[experts - 1, -1]]], dtype=np.int32))
    assert packed.dtype.itemsize == bytes_per_id
    assert packed[0, 0, 0] != packed[0, 0, 1]


@pytest.mark.parametrize("name", ["x.npy", "x.safetensors"])
def test_files_of_other_programs_are_read(name: str, tmp_path: Path) -> None:
    given, path = expected(range(3)).astype(np.int32), tmp_path / name
    if name.endswith("npy"):
        np.save(path, given)
    else:
        save_file({"routed_experts": given}, path)
    reader = ChoiceReader(path, SPEC)
    assert not reader.recorded
    reader.check(0, 3, digest)
    for step in range(3):
        np.testing.assert_array_equal(reader.read(step, 1, 2), ids(step)[4:12])
    write_choices(tmp_path / "again.safetensors", given)
    np.testing.assert_array_equal(read_choices(tmp_path / "again.safetensors"), given)


def test_every_sample_is_found_in_whatever_part_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "PART_BYTES", 2 * TOKENS * 4)
    record(tmp_path, range(5))
    assert [(first, end) for _, first, end in list_parts(tmp_path)] == [(0, 2), (2, 4), (4, 5)]
    reader = ChoiceReader(tmp_path, SPEC)
    reader.check(0, 5, digest)
    for step in range(5):
        for sample in range(3):
            rows = slice(sample * 4, sample * 4 + 4)
            np.testing.assert_array_equal(reader.read(step, sample, 1), ids(step)[rows])


@pytest.mark.parametrize("resumed", [0, 2, 3])
def test_a_resumed_run_records_on_from_its_checkpoint(resumed: int, tmp_path: Path) -> None:
    """Steps after the checkpoint are removed, in the middle of a part too, then recorded again."""
    record(tmp_path, range(4))
    (tmp_path / ".choices-00000004-00000005.safetensors.partial").write_bytes(b"half")
    record(tmp_path, range(resumed, 6), first=resumed)
    np.testing.assert_array_equal(stored(tmp_path), expected(range(6)))
    assert not list(tmp_path.glob(".*"))
    ChoiceReader(tmp_path, SPEC).check(0, 6, digest)


def test_a_rollback_records_the_steps_again(tmp_path: Path) -> None:
    writer = ChoiceWriter(tmp_path, SPEC, "runs/a", 0)
    for step in (0, 1, 2, 1, 2, 3):
        writer.add(step, ids(step), digest(step))
    writer.flush()
    np.testing.assert_array_equal(stored(tmp_path), expected(range(4)))


def test_a_full_disk_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ChoiceWriter(tmp_path, SPEC, "runs/a", 0)
    writer.add(0, ids(0), digest(0))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="cannot be written"):
        writer.flush()
    assert list_parts(tmp_path) == []


def test_the_choices_of_another_run_are_not_overwritten(tmp_path: Path) -> None:
    record(tmp_path, range(2))
    with pytest.raises(ConfigError, match=r"moe\.replay\.record=.*holds the choices of runs/a"):
        record(tmp_path, range(2), run="runs/b")
    with pytest.raises(CheckpointError, match="lacks the choices of step 3"):
        record(tmp_path, range(4, 5), first=4)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("layers", 3, "has 2 MoE layers, and this run 3"),
        ("experts", 16, "has 8 experts, and this run 16"),
        ("top_k", 1, "has 2 experts per token (moe.top_k), and this run 1"),
        ("seq_len", 6, "has 4 positions per sequence (data.seq_len), and this run 6"),
        ("global_batch", 2, "has 3 sequences per step (train.global_batch), and this run 2"),
        ("seed", 2, "was recorded with train.seed 1, and this run has 2"),
        ("data", "e" * 64, "was recorded with data of fingerprint dddddddddddd, and"),
    ],
)
def test_other_models_and_data_are_refused(
    field: str, value: Any, words: str, tmp_path: Path
) -> None:
    record(tmp_path, range(2))
    with pytest.raises(ConfigError) as refusal:
        ChoiceReader(tmp_path, replace(SPEC, **{field: value}))
    assert words in str(refusal.value)


def test_other_sequences_and_missing_steps_are_refused(tmp_path: Path) -> None:
    record(tmp_path, range(2))
    reader = ChoiceReader(tmp_path, SPEC)
    with pytest.raises(ConfigError, match="recorded with other sequences in step 1"):
        reader.check(0, 2, lambda step: "another order")
    with pytest.raises(
        ConfigError, match=r"no choices of step 3, and the run has 4; use .*steps=2"
    ):
        reader.check(0, 4, digest)
    with pytest.raises(ConfigError, match="no choices of step 6, and the run has 7"):
        reader.check(5, 7, digest)


def test_a_damaged_part_is_refused(tmp_path: Path) -> None:
    record(tmp_path, range(2))
    ((path, _, _),) = list_parts(tmp_path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        ChoiceReader(tmp_path, SPEC).check(0, 2, digest)
    path.write_bytes(content[:-9])
    with pytest.raises(ConfigError, match="cut off"):
        ChoiceReader(tmp_path, SPEC)
    path.write_bytes(b"no file of that kind")
    with pytest.raises(ConfigError, match="no safetensors file"):
        ChoiceReader(tmp_path, SPEC)


BAD = {
    "float": (np.zeros((12, 2, 2)), r"holds float64\[12, 2, 2\], not integers"),
    "flat": (np.zeros((12, 4), dtype=np.int32), r"\[12, 4\], not integers \[tokens, layers, K\]"),
    "layers": (np.zeros((12, 3, 2), dtype=np.int32), "has 3 MoE layers, and this run 2"),
    "part": (ids(0)[:10], "holds 10 tokens, not a multiple of the 3 x 4 of a step"),
    "large": (np.where(ids(0) == 7, 8, ids(0)), "expert 8, and there are 8"),
    "none": (np.where(ids(0) == 7, -1, ids(0)), "no expert, and there are 8"),
    "twice": (np.zeros((12, 2, 2), dtype=np.int32), "gives token 0 one expert twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_impossible_choices_are_refused(case: str, tmp_path: Path) -> None:
    given, words = BAD[case]
    np.save(tmp_path / "x.npy", given)
    with pytest.raises(ConfigError, match=words):
        ChoiceReader(tmp_path / "x.npy", SPEC).check(0, 1, digest)


def test_a_token_may_have_fewer_experts_where_the_router_can(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.where(ids(0) == 7, -1, ids(0)))
    reader = ChoiceReader(tmp_path / "x.npy", SPEC)
    reader.check(0, 1, digest, partly=True)
    assert (reader.read(0, 0, 3) == -1).any()


@pytest.mark.parametrize("kind", [">i4", "uint64", "F"])
def test_integers_of_every_kind_are_written_and_read(kind: str, tmp_path: Path) -> None:
    """Ids of a big-endian file or of unsigned 64 bits ended in a KeyError of their dtype."""
    given = ids(0).copy(order="F") if kind == "F" else ids(0).astype(kind)
    np.save(tmp_path / "x.npy", given)
    write_choices(tmp_path / "x.safetensors", given)
    for path in ("x.npy", "x.safetensors"):
        np.testing.assert_array_equal(read_choices(tmp_path / path), ids(0))


def test_what_is_no_layout_of_choices_is_not_written(tmp_path: Path) -> None:
    """`write_choices` wrote floats and flat lists of ids, which `read_choices` then refused."""
    for given, words in (BAD["float"], BAD["flat"]):
        with pytest.raises(ConfigError, match=words):
            write_choices(tmp_path / "x.safetensors", given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spec", ['{"data": "d"}', "[", "[]"])
def test_a_damaged_header_is_refused(spec: str, tmp_path: Path) -> None:
    """The header of a part is JSON within JSON; cut off, it ended in a traceback."""
    write_choices(tmp_path / "x.safetensors", ids(0), {"spec": spec})
    with pytest.raises(ConfigError, match="cannot be read as choices"):
        ChoiceReader(tmp_path / "x.safetensors", SPEC)


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    """An empty file ended the command with "Aborted!"; an archive, in a traceback."""
    with (tmp_path / "archive.npy").open("wb") as file:
        np.savez(file, ids(0))
    (tmp_path / "empty.npy").touch()
    for name in ("archive", "empty"):
        with pytest.raises(ConfigError, match="cannot be read as choices"):
            ChoiceReader(tmp_path / f"{name}.npy", SPEC)
        (tmp_path / f"{name}.npy").unlink()
    with pytest.raises(ConfigError, match="holds no choices of a run"):
        ChoiceReader(tmp_path, SPEC)
    with pytest.raises(ConfigError, match="cannot be read as choices"):
        ChoiceReader(tmp_path / "none.npy", SPEC)
    save_file({"a": ids(0), "b": ids(0)}, tmp_path / "two.safetensors")
    with pytest.raises(ConfigError, match="holds 2 tensors, none of them called experts"):
        ChoiceReader(tmp_path / "two.safetensors", SPEC)
