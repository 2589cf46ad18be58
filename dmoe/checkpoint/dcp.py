"""Shards of a state as safetensors files, through torch's DCP; only this module uses DCP.

Of DCP's storages only the Hugging Face one writes no pickle (the default one pickles `.metadata`
and the tensors). DCP reshards DTensors over world and EP size. Between live ranks it sends plans by
object collectives, which pickle in memory; no pickle is written to disk or read from it.

A safetensors file:

    8 bytes: length of the header | header, JSON, padded to a multiple of 8 | tensors without gaps

`safetensors.torch.save` builds the whole file in memory and holds Python's lock meanwhile: training
stands still for 1.2 s per 400 MB, even if another thread writes (version 0.8, measured). Here files
are written tensor by tensor, the lock is free during disk writes, and at most one tensor of an
accelerator is in memory. `validate.check_shards` reads every file back with the library itself
before a checkpoint exists.
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

from dmoe.checkpoint.validate import DTYPES
from dmoe.config.errors import CheckpointError


def write_shards(
    directory: Path, state: Mapping[str, Tensor], group: dist.ProcessGroup | None
) -> None:
    """Write and fsync this rank's chunks of `state` as one file in `directory`. Collective.

    A chunk that several ranks hold is written by one of them.

    Raises:
        CheckpointException: torch's, on every rank, if any rank failed.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    _ignore_single_process_warning()
    save(dict(state), storage_writer=_Writer(directory), planner=planner, process_group=group)


def read_shards(
    directory: Path, state: Mapping[str, Tensor], group: dist.ProcessGroup | None
) -> None:
    """Fill this rank's chunks of `state` in place from the files of `directory`. Collective.

    Raises:
        CheckpointException: torch's, on every rank, if any rank failed.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    _ignore_single_process_warning()
    load(
        dict(state),
        storage_reader=HuggingFaceStorageReader(str(directory)),
        planner=planner,
        process_group=group,
    )


class _Writer(HuggingFaceStorageWriter):
    """Writes one file per rank in the calling thread, with errors that DCP can send to other ranks.

    DCP's own writer threads drop exceptions: a full disk gives a checkpoint that lacks tensors. DCP
    also pickles an exception to send it, which fails for classes whose constructor takes several
    arguments; a CheckpointError is always sent.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), save_distributed=True, thread_count=1)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written: Future[list[WriteResult]] = Future()
        # The results are for DCP's own metadata file, which this storage does not write.
        written.set_result([])
        if plan.items:
            try:
                _write_plan(Path(self.path), plan, planner)
            except Exception as error:
                raise CheckpointError(f"{type(error).__name__}: {error}") from None
        return written


def _write_plan(directory: Path, plan: SavePlan, planner: SavePlanner) -> None:
    offsets, chunks = {}, []
    for item in plan.items:
        assert item.tensor_data is not None, "anything but a tensor would be pickled"
        name, data = item.index.fqn, item.tensor_data
        assert name not in offsets, (
            f"two chunks of {name!r} in one file: a safetensors file holds one tensor per name"
        )
        offsets[name] = {"saved_offsets": list(data.chunk.offsets)}
        chunks.append(
            Chunk(
                name,
                data.properties.dtype,
                tuple(data.chunk.sizes),
                partial(_tensor_of, planner, item),
            )
        )
    metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    shard_index = plan.storage_data["shard_index"]
    file_name = f"shard-{shard_index:05d}-model-00001-of-00001.safetensors"
    write_safetensors(directory / file_name, chunks, metadata)


def _tensor_of(planner: SavePlanner, item: WriteItem) -> Tensor:
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, Tensor)
    return tensor


def _ignore_single_process_warning() -> None:
    """Ignore DCP's warning that, without a process group, it assumes a single process.

    The filter stays: `warnings.catch_warnings` replaces the filters of the whole process, and this
    may run in a thread beside training.
    """
    if not dist.is_initialized():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
        )


_DTYPE_NAMES = {getattr(torch, torch_name): name for name, torch_name in DTYPES.items()}
_MAX_WRITE_BYTES = 64 << 20  # per call: the system writes at most 2 GiB in one call


@dataclass(frozen=True)
class Chunk:
    """One tensor of a file: its header entry, and a function that reads its values later."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Number of bytes."""
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, chunks: Iterable[Chunk], metadata: Mapping[str, str]) -> None:
    """Write and fsync a new file; `read` of each chunk is called once, in the order of the file.

    A truncated file is left in place.

    Raises:
        OSError: disk full, or the file exists; also whatever `read` raises.
    """
    # Wide dtypes first: every tensor stays aligned to its dtype.
    ordered = sorted(chunks, key=lambda chunk: (-chunk.dtype.itemsize, chunk.name))
    with open(path, "xb", buffering=0) as file:
        _write(file, memoryview(_header(ordered, metadata)))
        for chunk in ordered:
            tensor = chunk.read().detach().cpu().contiguous()
            assert (tensor.dtype, tuple(tensor.shape)) == (chunk.dtype, chunk.shape), (
                f"{chunk.name!r} does not match its header entry"
            )
            if chunk.size:
                _write(file, tensor.reshape(-1).view(torch.uint8).numpy().data)
        os.fsync(file.fileno())


def _header(ordered: list[Chunk], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for chunk in ordered:
        start, end = end, end + chunk.size
        entries[chunk.name] = {
            "dtype": _DTYPE_NAMES[chunk.dtype],
            "shape": list(chunk.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(file: io.FileIO, data: memoryview) -> None:
    """Write all of `data`: one call may write less than it was given."""
    while data:
        data = data[file.write(data[:_MAX_WRITE_BYTES]) :]
