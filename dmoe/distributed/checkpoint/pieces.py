"""The pieces of a state as safetensors files, through torch's DCP, the one place that knows it.

Of DCP's storages the Hugging Face one alone writes no pickle (the default one pickles `.metadata` and the tensors), and DCP
reshards DTensors over world and EP size. Between live ranks DCP sends its plans by object collectives, which pickle in
memory; no such byte reaches a disk, and none is read from one.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from dmoe.config.errors import CheckpointError
from dmoe.distributed.checkpoint.stream import Piece, write_file

__all__ = ["read_pieces", "write_pieces"]


def write_pieces(directory: Path, state: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Write and fsync this rank's share of `state` as one file in `directory`; a piece held by several ranks is written by one.

    Raises on every rank what any rank raised (torch's CheckpointException). Collective.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    _one_process_is_fine()
    save(dict(state), storage_writer=_Writer(directory), planner=planner, process_group=group)


def read_pieces(directory: Path, state: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Fill the tensors of `state` in place from the files of `directory`, each rank its own pieces. Raises as above. Collective."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    _one_process_is_fine()
    load(dict(state), storage_reader=HuggingFaceStorageReader(str(directory)), planner=planner, process_group=group)


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
        assert name not in chunks, f"two pieces of {name!r} in one file: a safetensors file holds one tensor of a name"
        chunks[name] = {"saved_offsets": list(data.chunk.offsets)}
        pieces.append(Piece(name, data.properties.dtype, tuple(data.chunk.sizes), partial(_tensor_of, planner, item)))
    metadata = {"DCP_SHARDING_INFO": json.dumps(chunks), "DCP_VERSION": "1.0", "format": "pt"}
    write_file(directory / f"shard-{plan.storage_data['shard_index']:05d}-model-00001-of-00001.safetensors", pieces, metadata)


def _tensor_of(planner: SavePlanner, item: WriteItem) -> Tensor:
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, Tensor)
    return tensor


def _one_process_is_fine() -> None:
    """Without a process group DCP warns that it assumes a single process, which is what is meant.

    The filter stays: `warnings.catch_warnings` swaps the filters of the whole process, and this may be a thread beside training.
    """
    if not dist.is_initialized():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
