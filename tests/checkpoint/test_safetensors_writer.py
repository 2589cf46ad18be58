"""Files written tensor by tensor equal those of the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from dmoe.checkpoint import dcp
from dmoe.checkpoint.dcp import Chunk, write_safetensors
from dmoe.checkpoint.validate import DTYPES


def every_kind() -> dict[str, Tensor]:
    tensors = {
        f"{name}.{n}": (torch.arange(n) % 3).to(getattr(torch, name))
        for name in DTYPES.values()
        for n in (1, 5, 0)
    }
    return tensors | {
        "scalar": torch.tensor(3.5),
        "none": torch.zeros(0, 4),
        'odd "name" é': torch.ones(2, 3, 2),
    }


def header_of(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def chunks_of(tensors: dict[str, Tensor]) -> list[Chunk]:
    return [Chunk(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    tensors = every_kind()
    write_safetensors(tmp_path / "file", chunks_of(tensors), {"format": "pt"})
    data = (tmp_path / "file").read_bytes()
    read = safetensors.torch.load(data)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name], tensor)
    with safetensors.safe_open(str(tmp_path / "file"), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_tensor_is_aligned_to_its_type(tmp_path: Path) -> None:
    """A reader can then map the file instead of copying it."""
    tensors = every_kind()
    write_safetensors(tmp_path / "file", chunks_of(tensors), {})
    header = header_of((tmp_path / "file").read_bytes())
    assert len(header) % 8 == 0
    for name, entry in json.loads(header).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % tensors[name].itemsize == 0


def test_a_strided_tensor_is_written_in_order(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4).t()
    write_safetensors(tmp_path / "file", chunks_of({"w": tensor}), {})
    assert torch.equal(safetensors.torch.load_file(tmp_path / "file")["w"], tensor)


def test_a_system_that_writes_less_than_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux writes at most 2 GiB in one call, a network file system often less."""
    monkeypatch.setattr(dcp, "_MAX_WRITE_BYTES", 7)
    tensors = every_kind()
    write_safetensors(tmp_path / "file", chunks_of(tensors), {})
    assert all(
        torch.equal(value, tensors[name])
        for name, value in safetensors.torch.load_file(tmp_path / "file").items()
    )


def test_a_file_that_exists_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError):
        write_safetensors(tmp_path / "file", chunks_of({"w": torch.ones(1)}), {})
    assert (tmp_path / "file").read_text() == "precious"
