"""Save checkpoints in the calling thread, or in a writer thread from a copy of the state.

    save()   main thread:  wait for the previous writer | copy the state | return to training
             writer:                                                     | write | verify | prune

The writer has its own process group (`ParallelMesh.checkpoint_group`), so that its collectives
cannot mix with those of a step. At most one save is in progress. The writers of all ranks agree on
a failure, which is kept until the trainer asks and is reported once.

The writer is a daemon thread. A run that ends normally waits for it (`close`). If the trainer
fails, its peers may be dead or frozen, and an ordinary thread would keep the process until the
group's time-out, minutes after the error was printed. Such a thread leaves a `.tmp` directory,
which is not taken for a checkpoint and is deleted by the next run.
"""

from __future__ import annotations

import copy
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dmoe.checkpoint import save_load
from dmoe.checkpoint.consensus import RankGroup
from dmoe.checkpoint.save_load import verify_and_prune
from dmoe.checkpoint.validate import local_tensor

ALIGNMENT = 64
"""Bytes at whose multiples copied tensors begin: a cache line, and a multiple of any dtype."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that was written and verified, after which old ones were deleted."""

    step: int
    blocking_seconds: float
    """Time in `save`: for a writer thread the wait for the previous one and the copy, else all."""
    seconds: float
    """Time from the call to the end of the pruning."""
    bytes: int
    """Size of all files of all ranks."""


class AsyncSaver:
    """Saves one run's checkpoints under `root` and keeps the newest `max_kept`.

    All methods except `failed`, `take_finished` and `drain` are collective. Nothing else may use
    `group` while the saver exists.
    """

    def __init__(
        self, root: Path, max_kept: int, group: dist.ProcessGroup | None, asynchronous: bool
    ) -> None:
        self.root, self.max_kept, self.group = Path(root), max_kept, group
        self.asynchronous = asynchronous
        self._staging = Staging()
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._finished: list[SavedCheckpoint] = []

    def save(self, step: int, state: Mapping[str, Tensor], extra: dict[str, Any]) -> None:
        """Write, verify and prune; with a writer thread, copy this rank's tensors and return.

        Cost: `save_load.save` and one more read of every byte; with a writer thread also memory for
        a copy, kept until `close`.

        Args:
            step: number of optimizer steps done.
            state: tensors by name, as in `save_load.save`.
            extra: plain JSON.

        Raises:
            CheckpointError: on every rank. With a writer thread it is the previous save's, unless
                already reported, and this save is not started; its own error is raised by `wait`
                or the next `save`. See `wait` for other errors.
        """
        start = time.monotonic()
        self.wait()
        if not self.asynchronous:
            size = self._write(step, state, extra)
            seconds = time.monotonic() - start
            self._finished.append(SavedCheckpoint(step, seconds, seconds, size))
            return
        copy_error: Exception | None = None
        copied: dict[str, Any] = {}
        try:
            copied, extra = self._staging.copy(state), copy.deepcopy(extra)
        # This rank's writer reports the error: the writers of the other ranks would wait for it.
        except Exception as error:
            copy_error = error
        blocking_seconds = time.monotonic() - start
        arguments = (step, copied, extra, copy_error, start, blocking_seconds)
        self._writer = threading.Thread(
            target=self._write_in_background, args=arguments, name=f"save-{step}", daemon=True
        )
        self._writer.start()

    @property
    def failed(self) -> bool:
        """True if this rank's writer ended with an error that was not raised yet. Local.

        One rank may see it a step before another, so ranks agree on it before they call `wait`.
        """
        return self._error is not None

    def wait(self) -> None:
        """Wait until the save in progress, if any, has ended.

        Raises:
            CheckpointError: of that save, the same on every rank, once.
            RuntimeError: torch's, for a dead peer or the group's time-out. The group is broken and
                the run must end.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def take_finished(self) -> list[SavedCheckpoint]:
        """Return the saves completed since the last call. Local."""
        count = len(self._finished)  # the writer may append meanwhile
        finished, self._finished[:count] = self._finished[:count], []
        return finished

    def close(self) -> None:
        """End a successful run: `wait`, free the copy. Call it before the groups are destroyed."""
        try:
            self.wait()
        finally:
            self._staging.clear()

    def drain(self, seconds: float = 10.0) -> None:
        """End a failed run: wait at most `seconds` for the writer, then leave it. Local.

        Never raises, so that the run's own error is reported; a failed save is a warning.
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
        copy_error: Exception | None,
        start: float,
        blocking_seconds: float,
    ) -> None:
        try:
            with RankGroup(self.group).all_or_none(f"copying the state of step {step}"):
                if copy_error is not None:
                    raise copy_error
            size = self._write(step, copied, extra)
            seconds = time.monotonic() - start
            self._finished.append(SavedCheckpoint(step, blocking_seconds, seconds, size))
        # This is the thread's first frame: nothing above would see the error.
        except BaseException as error:
            self._error = error

    def _write(self, step: int, state: Mapping[str, Tensor], extra: dict[str, Any]) -> int:
        path = save_load.save(self.root, step, state, extra, group=self.group)
        manifest = verify_and_prune(path, self.max_kept, group=self.group)
        return sum(entry.size for entry in manifest.files.values())


class Staging:
    """One CPU buffer for a copy of this rank's part of every tensor.

    It is kept from one save to the next: first writes to new pages cost more than the copy itself
    (0.17 s against 0.06 s for 400 MB, measured), and pinned memory is more expensive still.

    For tensors on a GPU it is pinned, by registering it: torch's allocator of pinned memory rounds
    every tensor up to a power of two, up to twice the state of all ranks of a host, and keeps what
    is freed.
    """

    _memory: Tensor
    _pinned = False
    _buffers: dict[str, Tensor]
    """Views of the memory."""
    _layout: list[tuple[str, torch.Size, torch.dtype, bool]]
    """Of the buffers: name, shape, dtype, and whether the tensor is on a GPU."""

    def __init__(self) -> None:
        self.clear()

    def copy(self, state: Mapping[str, object]) -> dict[str, object]:
        """Copy every tensor's local part to the CPU.

        Values that are not tensors pass through: `describe_tensors` refuses them. The result is
        valid until the next call, which writes into the same memory. From an accelerator all copies
        are queued, with one wait. Raises if memory runs out.
        """
        parts = {name: local_tensor(v) for name, v in state.items() if isinstance(v, Tensor)}
        layout = [(name, part.shape, part.dtype, part.is_cuda) for name, part in parts.items()]
        if layout != self._layout:
            self.clear()
            self._allocate(parts)
            self._layout = layout
        for name, buffer in self._buffers.items():
            buffer.copy_(parts[name], non_blocking=True)
        if self._pinned:
            torch.cuda.current_stream().synchronize()
        return {
            name: _with_layout_of(value, self._buffers[name]) if name in self._buffers else value
            for name, value in state.items()
        }

    def clear(self) -> None:
        """Free the memory."""
        if self._pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr()))
        self._pinned, self._memory = False, torch.empty(0, dtype=torch.uint8)
        self._buffers, self._layout = {}, []

    def _allocate(self, parts: Mapping[str, Tensor]) -> None:
        """Allocate the buffer, with a view for each tensor at a multiple of `ALIGNMENT` bytes."""
        sizes = (-(-part.nbytes // ALIGNMENT) * ALIGNMENT for part in parts.values())
        starts = list(accumulate(sizes, initial=0))
        self._memory = torch.empty(starts[-1], dtype=torch.uint8, device="cpu")
        if any(part.is_cuda for part in parts.values()) and starts[-1]:
            address, size = self._memory.data_ptr(), self._memory.nbytes
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, size, 1))
            self._pinned = True
        self._buffers = {
            name: self._memory[start : start + part.nbytes].view(part.dtype).view(part.shape)
            for (name, part), start in zip(parts.items(), starts, strict=False)
        }


def _with_layout_of(value: object, buffer: Tensor) -> Tensor:
    """Make `buffer` a DTensor like the one it was copied from; a plain tensor stays plain.

    `DTensor.from_local` would move it to the mesh's device. Saving only needs shapes, offsets and
    the local part, so the constructor is enough.
    """
    if not isinstance(value, DTensor):
        return buffer
    return DTensor(buffer, value._spec, requires_grad=False)
