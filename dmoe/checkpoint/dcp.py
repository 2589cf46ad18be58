"""The pieces of a state as safetensors files, through torch's DCP, the one place that knows it.

Of DCP's storages the Hugging Face one alone writes no pickle (the default one pickles `.metadata` and the tensors), and DCP
reshards DTensors over world and EP size. Between live ranks DCP sends its plans by object collectives, which pickle in
memory; no such byte reaches a disk, and none is read from one.

A safetensors file, written tensor by tensor.

    8 bytes: length of the header | header, JSON, padded with spaces to a multiple of 8 | the tensors' bytes, without gaps

`safetensors.torch.save` builds the whole file in memory and holds Python's lock meanwhile: 1.2 s of standstill per 400 MB, for the
training thread too while another one writes (version 0.8, measured). Here the lock is free while the disk is busy, and beyond the
state one tensor is in memory, of those on an accelerator. What is written is read back by the library itself: `shards.py`
demands that of every file before a checkpoint exists.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from dmoe.checkpoint.tensor_entries import DTYPES
from dmoe.config.errors import CheckpointError


def write_shards(
    directory: Path, state: Mapping[str, Tensor], group: dist.ProcessGroup | None
) -> None:
    """Write and fsync this rank's share of `state` as one file in `directory`; a piece held by several ranks is written by one.

    Raises on every rank what any rank raised (torch's CheckpointException). Collective.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    _one_process_is_fine()
    save(dict(state), storage_writer=_Writer(directory), planner=planner, process_group=group)


def read_shards(
    directory: Path, state: Mapping[str, Tensor], group: dist.ProcessGroup | None
) -> None:
    """Fill the tensors of `state` in place from the files of `directory`, each rank its own pieces. Raises as above. Collective."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    _one_process_is_fine()
    load(
        dict(state),
        storage_reader=HuggingFaceStorageReader(str(directory)),
        planner=planner,
        process_group=group,
    )


class _Writer(HuggingFaceStorageWriter):
    """One file a rank, written by the calling thread through `stream.py`, whose errors can be sent to the other ranks.

    The calling thread is not a matter of speed: DCP's own writer threads raise exceptions that nobody reads, and a full disk gives
    a checkpoint that lacks tensors. DCP also pickles an exception to send it to the coordinator, which fails for a class
    whose constructor takes several arguments; a CheckpointError always survives.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), save_distributed=True, thread_count=1)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written: Future[list[WriteResult]] = Future()
        written.set_result([])  # only DCP's own metadata would want to know more, and there is none
        if plan.items:
            try:
                _write_plan(Path(self.path), plan, planner)
            except Exception as error:
                raise CheckpointError(f"{type(error).__name__}: {error}") from None
        return written


def _write_plan(directory: Path, plan: SavePlan, planner: SavePlanner) -> None:
    chunks, pieces = {}, []
    for item in plan.items:
        assert item.tensor_data is not None, "anything but a tensor would be pickled"
        name, data = item.index.fqn, item.tensor_data
        assert name not in chunks, (
            f"two pieces of {name!r} in one file: a safetensors file holds one tensor of a name"
        )
        chunks[name] = {"saved_offsets": list(data.chunk.offsets)}
        pieces.append(
            Chunk(
                name,
                data.properties.dtype,
                tuple(data.chunk.sizes),
                partial(_tensor_of, planner, item),
            )
        )
    metadata = {"DCP_SHARDING_INFO": json.dumps(chunks), "DCP_VERSION": "1.0", "format": "pt"}
    write_safetensors(
        directory
        / f"shard-{plan.storage_data['shard_index']:05d}-model-00001-of-00001.safetensors",
        pieces,
        metadata,
    )


def _tensor_of(planner: SavePlanner, item: WriteItem) -> Tensor:
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, Tensor)
    return tensor


def _one_process_is_fine() -> None:
    """Without a process group DCP warns that it assumes a single process, which is what is meant.

    The filter stays: `warnings.catch_warnings` swaps the filters of the whole process, and this may be a thread beside training.
    """
    if not dist.is_initialized():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
        )


_NAMES = {getattr(torch, torch_name): name for name, torch_name in DTYPES.items()}
_SLICE = 64 << 20  # bytes handed to the system at a time: it writes at most 2 GiB in one call


@dataclass(frozen=True)
class Chunk:
    """What the header says of one tensor, and how to get at its numbers when their turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def size(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, pieces: Iterable[Chunk], metadata: Mapping[str, str]) -> None:
    """Write and fsync a new file; `read` of each piece is called once, in the order of the file.

    Errors: OSError (disk full, the file exists); what `read` raises. A file cut short is left where it is.
    """
    ordered = sorted(
        pieces, key=lambda piece: (-piece.dtype.itemsize, piece.name)
    )  # wide types first: all stay aligned
    with open(path, "xb", buffering=0) as file:
        _write(file, memoryview(_header(ordered, metadata)))
        for piece in ordered:
            tensor = piece.read().detach().cpu().contiguous()
            assert (tensor.dtype, tuple(tensor.shape)) == (piece.dtype, piece.shape), (
                f"{piece.name!r} is not what was announced"
            )
            if piece.size:
                _write(file, tensor.reshape(-1).view(torch.uint8).numpy().data)
        os.fsync(file.fileno())


def _header(ordered: list[Chunk], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for piece in ordered:
        start, end = end, end + piece.size
        entries[piece.name] = {
            "dtype": _NAMES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(file: io.FileIO, data: memoryview) -> None:
    """All of it: one call may write less than it was given."""
    while data:
        data = data[file.write(data[:_SLICE]) :]
