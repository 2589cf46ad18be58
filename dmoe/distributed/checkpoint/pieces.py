"""The pieces of a state as safetensors files, through torch's DCP, the one place that knows it.

Of DCP's storages the Hugging Face one alone writes no pickle (the default one pickles `.metadata` and the tensors), and DCP
reshards DTensors over world and EP size. Between live ranks DCP sends its plans by object collectives, which pickle in
memory; no such byte reaches a disk, and none is read from one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
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

__all__ = ["read_pieces", "write_pieces"]


def write_pieces(directory: Path, state: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Write and fsync this rank's share of `state` as one file in `directory`; a piece held by several ranks is written by one.

    Raises on every rank what any rank raised (torch's CheckpointException). Collective.
    """
    with _one_process_is_fine():
        save(dict(state), storage_writer=_Writer(directory), planner=_Planner(), process_group=group)


def read_pieces(directory: Path, state: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Fill the tensors of `state` in place from the files of `directory`, each rank its own pieces. Raises as above. Collective."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _one_process_is_fine():
        load(dict(state), storage_reader=HuggingFaceStorageReader(str(directory)), planner=planner, process_group=group)


class _Writer(HuggingFaceStorageWriter):
    """One file a rank, written by the calling thread, whose errors can be sent to the other ranks.

    thread_count=1 is not a matter of speed: with more, DCP starts threads whose exceptions nobody reads, and a full disk gives
    a checkpoint that lacks tensors. DCP also pickles an exception to send it to the coordinator, which fails for a class
    whose constructor takes several arguments; a CheckpointError always survives.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), save_distributed=True, thread_count=1)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            written: Future[list[WriteResult]] = super().write_data(plan, planner)
            return written
        except Exception as error:
            raise CheckpointError(f"{type(error).__name__}: {error}") from None


class _Planner(DefaultSavePlanner):
    """safetensors refuses tensors that are strided or share memory (tied weights): those are copied, one at a time."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._storages: set[int] = set()

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        assert isinstance(object, Tensor), "anything but a tensor would be pickled"
        storage = object.untyped_storage().data_ptr()
        if storage in self._storages or not object.is_contiguous():
            return object.detach().clone(memory_format=torch.contiguous_format)
        self._storages.add(storage)
        return object


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """Without a process group DCP warns that it assumes a single process, which is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
