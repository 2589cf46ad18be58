"""When a checkpoint is written: while the caller waits, or by a thread beside it, from a copy.

    save()   main thread:  wait for the last writer | copy the state | go on training, which may change every tensor at once
             writer:                                                 | write | hash | commit | verify | prune

The writer has a process group of its own (`Topology.checkpoint`), so its collectives cannot meet those of a step. One save is in
flight at most. A failure in the writer is agreed between the writers of all ranks, stays until the trainer is told, and is told once.

The writer is a daemon thread: a run that ends well waits for it (`close`), but where the trainer dies of an error its peers may be
dead or frozen, and an ordinary thread would then hold the process until the group's time-out, minutes after the error was printed.
What such a thread leaves is a `.tmp` directory, which no run takes for a checkpoint and the next one deletes.
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

import torch.distributed as dist
from torch import Tensor

from dmoe.distributed.checkpoint import store
from dmoe.distributed.checkpoint.agree import RankGroup
from dmoe.distributed.checkpoint.retention import verify_and_prune
from dmoe.distributed.checkpoint.staging import Staging

__all__ = ["Saved", "AsyncSaver"]


@dataclass(frozen=True)
class Saved:
    """One checkpoint that is whole, verified, and after which older ones were forgotten."""

    step: int
    seconds_held: float
    """How long `save` kept its caller: in the background the wait for the last writer and the copy, else everything."""
    seconds: float
    """From the call to the end of the pruning."""
    bytes: int
    """Of all files, of all ranks."""


class AsyncSaver:
    """Saves one run's checkpoints under `root` and keeps the newest `keep`. All methods but `failed`, `finished` and `abandon` are
    for all ranks together; nothing else may use `group` while the saver lives."""

    def __init__(self, root: Path, keep: int, group: dist.ProcessGroup | None, asynchronous: bool) -> None:
        self.root, self.keep, self.group, self.asynchronous = Path(root), keep, group, asynchronous
        self._staging = Staging()
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._finished: list[Saved] = []

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
            self._finished.append(Saved(step, seconds, seconds, size))
            return
        problem: Exception | None = None
        copied: dict[str, Any] = {}
        try:
            copied, extra = self._staging.copy(state), copy.deepcopy(extra)
        except Exception as error:  # this rank's writer tells the others, whose writers would wait for it
            problem = error
        held = time.monotonic() - began
        arguments = (step, copied, extra, problem, began, held)
        self._writer = threading.Thread(target=self._in_background, args=arguments, name=f"save-{step}", daemon=True)
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

    def finished(self) -> list[Saved]:
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
                warnings.warn(f"{self._writer.name} under {self.root} was not finished", stacklevel=2)
        if self._error is not None:
            warnings.warn(f"the last save under {self.root} failed: {self._error}", stacklevel=2)

    def _in_background(
        self, step: int, copied: dict[str, Any], extra: dict[str, Any], problem: Exception | None, began: float, held: float
    ) -> None:
        try:
            with RankGroup(self.group).all_or_none(f"copying the state of step {step}"):
                if problem is not None:
                    raise problem
            size = self._write(step, copied, extra)
            self._finished.append(Saved(step, held, time.monotonic() - began, size))
        except BaseException as error:  # nothing above this frame would see it
            self._error = error

    def _write(self, step: int, state: Mapping[str, Tensor], extra: dict[str, Any]) -> int:
        path = store.save(self.root, step, state, extra, group=self.group)
        found = verify_and_prune(path, self.keep, group=self.group)
        return sum(entry.size for entry in found.files.values())
