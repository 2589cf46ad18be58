"""When a checkpoint is written: while the caller waits, or by a thread beside it, from a copy.

    save()   main thread:  wait for the last writer | copy the state | go on training, which may change every tensor at once
             writer:                                                 | write | hash | commit | verify | prune

The writer has a process group of its own (`Topology.checkpoint`), so its collectives cannot meet those of a step. One save is in
flight at most. A failure in the writer is agreed between the writers of all ranks, stays until the trainer is told, and is told once.

The writer is a daemon thread: a run that ends well waits for it (`close`), but where the trainer dies of an error its peers may be
dead or frozen, and an ordinary thread would then hold the process until the group's time-out, minutes after the error was printed.
What such a thread leaves is a `.tmp` directory, which no run takes for a checkpoint and the next one deletes.

A copy of the state on the CPU, which training cannot change while it is written.

The copy lives in buffers that are kept from one save to the next: first writes to fresh pages cost the kernel more than the copy
itself (0.17 s against 0.06 s for 400 MB, measured), and pinned memory for an accelerator is dearer still.
"""

from __future__ import annotations

import copy
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dmoe.checkpoint import save_load
from dmoe.checkpoint.consensus import RankGroup
from dmoe.checkpoint.save_load import verify_and_prune
from dmoe.checkpoint.tensor_entries import local_tensor


@dataclass(frozen=True)
class SavedCheckpoint:
    """One checkpoint that is whole, verified, and after which older ones were forgotten."""

    step: int
    blocking_seconds: float
    """How long `save` kept its caller: in the background the wait for the last writer and the copy, else everything."""
    seconds: float
    """From the call to the end of the pruning."""
    bytes: int
    """Of all files, of all ranks."""


class AsyncSaver:
    """Saves one run's checkpoints under `root` and keeps the newest `keep`. All methods but `failed`, `finished` and `abandon` are
    for all ranks together; nothing else may use `group` while the saver lives."""

    def __init__(
        self, root: Path, keep: int, group: dist.ProcessGroup | None, asynchronous: bool
    ) -> None:
        self.root, self.max_kept, self.group, self.asynchronous = Path(root), keep, group, asynchronous
        self._staging = Staging()
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._finished: list[SavedCheckpoint] = []

    def save(self, step: int, state: Mapping[str, Tensor], extra: dict[str, Any]) -> None:
        """Write, verify and prune; in the background only the copy of this rank's tensors is made before it returns.

        Raises: CheckpointError on every rank. In the background that is the previous save's, if nobody was told yet, and this
            one is not started; its own comes out of `wait` or the next `save`. See `wait` for other errors.
        Cost: `store.save` and one more read of every byte; in the background memory for a copy, kept until `close`.
        """
        began = time.monotonic()
        self.wait()
        if not self.asynchronous:
            size = self._write(step, state, extra)
            seconds = time.monotonic() - began
            self._finished.append(SavedCheckpoint(step, seconds, seconds, size))
            return
        problem: Exception | None = None
        copied: dict[str, Any] = {}
        try:
            copied, extra = self._staging.copy(state), copy.deepcopy(extra)
        except (
            Exception
        ) as error:  # this rank's writer tells the others, whose writers would wait for it
            problem = error
        held = time.monotonic() - began
        arguments = (step, copied, extra, problem, began, held)
        self._writer = threading.Thread(
            target=self._write_in_background, args=arguments, name=f"save-{step}", daemon=True
        )
        self._writer.start()

    @property
    def failed(self) -> bool:
        """Whether this rank's writer has ended with an error that nobody was told of. Local and free: any rank may see it a step
        before another, so ranks agree on it before they call `wait`."""
        return self._error is not None

    def wait(self) -> None:
        """Until the save in flight, if any, has ended.

        Raises: its CheckpointError, the same on every rank, once. Another error (a RuntimeError of torch for a dead peer or the
            group's time-out) is no failed save but a broken group, and a run must not go on from it.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def take_finished(self) -> list[SavedCheckpoint]:
        """The saves that were completed since the last call. Local."""
        done = len(self._finished)  # the writer may append meanwhile
        found, self._finished[:done] = self._finished[:done], []
        return found

    def close(self) -> None:
        """The end of a run that ends well: `wait`, and give the copy's memory back. Call it before the groups are destroyed."""
        try:
            self.wait()
        finally:
            self._staging.clear()

    def drain(self, seconds: float = 10.0) -> None:
        """The end of a run that failed: let the writer finish if it can within `seconds`, and leave it behind if not. Local.

        Never raises, so that the error the run ends with stays the one that is told; what happens to the save is a warning.
        """
        if self._writer is not None:
            self._writer.join(seconds)
            if self._writer.is_alive():
                warnings.warn(
                    f"{self._writer.name} under {self.root} was not finished", stacklevel=2
                )
        if self._error is not None:
            warnings.warn(f"the last save under {self.root} failed: {self._error}", stacklevel=2)

    def _write_in_background(
        self,
        step: int,
        copied: dict[str, Any],
        extra: dict[str, Any],
        problem: Exception | None,
        began: float,
        held: float,
    ) -> None:
        try:
            with RankGroup(self.group).all_or_none(f"copying the state of step {step}"):
                if problem is not None:
                    raise problem
            size = self._write(step, copied, extra)
            self._finished.append(SavedCheckpoint(step, held, time.monotonic() - began, size))
        except BaseException as error:  # nothing above this frame would see it
            self._error = error

    def _write(self, step: int, state: Mapping[str, Tensor], extra: dict[str, Any]) -> int:
        path = save_load.save(self.root, step, state, extra, group=self.group)
        found = verify_and_prune(path, self.max_kept, group=self.group)
        return sum(entry.size for entry in found.files.values())


class Staging:
    """One buffer a tensor, as large as this rank's part of it."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, state: Mapping[str, object]) -> dict[str, object]:
        """`state` with every tensor's local part copied to the CPU; what is no tensor is handed on, for `describe` to refuse.

        The result is valid until the next call, which writes into the same memory. Errors: out of memory.
        Cost: one pass over this rank's parts; from an accelerator all copies are queued, then waited for once.
        """
        self._buffers = {
            name: self._buffer(name, value)
            for name, value in state.items()
            if isinstance(value, Tensor)
        }
        for name, buffer in self._buffers.items():
            buffer.copy_(_source(state[name]), non_blocking=True)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return {
            name: _like(value, self._buffers[name]) if name in self._buffers else value
            for name, value in state.items()
        }

    def clear(self) -> None:
        """Give the memory back."""
        self._buffers = {}

    def _buffer(self, name: str, value: Tensor) -> Tensor:
        part, old = local_tensor(value), self._buffers.get(name)
        if old is not None and old.shape == part.shape and old.dtype == part.dtype:
            return old
        return torch.empty(part.shape, dtype=part.dtype, device="cpu", pin_memory=part.is_cuda)


def _source(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return local_tensor(value)


def _like(value: object, buffer: Tensor) -> Tensor:
    """`buffer` as the part of the DTensor it was copied from, or as it is.

    `DTensor.from_local` would move it to the device of the mesh; nothing but shapes, offsets and this rank's part is asked of
    the result, so its constructor is enough.
    """
    if not isinstance(value, DTensor):
        return buffer
    return DTensor(buffer, value._spec, requires_grad=False)
