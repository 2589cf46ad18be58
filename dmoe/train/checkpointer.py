"""Saving, resuming and going back: what of a run a checkpoint holds, and when it may be taken up.

When a checkpoint is due, and what one that fails does to the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import dmoe
from dmoe.checkpoint import save_load
from dmoe.checkpoint.async_saver import AsyncSaver, SavedCheckpoint
from dmoe.checkpoint.rng_state import gather_rng_state, rng_tables, set_rng_state
from dmoe.checkpoint.save_load import remove_partials
from dmoe.config.errors import CheckpointError
from dmoe.config.schema import CheckpointConfig
from dmoe.distributed.state_dict import model_state, optimizer_state, set_optimizer_step
from dmoe.observability.logger import RunLogger
from dmoe.runs.directory import RunDir
from dmoe.train.engine import Engine
from dmoe.train.reduction import Requests
from dmoe.train.restore import check_same_run, describe_changes
from dmoe.train.step_guard import StepGuard
from dmoe.train.tasks import Data

NOTHING: Mapping[str, torch.Tensor] = {}


class Checkpointer:
    """The checkpoints of one run. Every method but `failed` and `finished` is collective.

    A step that is given is the number of optimizer steps done. The data order, the schedule and all noise are functions of it.
    """

    def __init__(self, engine: Engine, data: Data, run: RunDir, guard: StepGuard) -> None:
        self.engine, self.data, self.guard, self.root = engine, data, guard, run.checkpoints
        config, self.group = engine.config.checkpoint, engine.mesh.checkpoint_group
        """`group` has the long time-out: rank 0 may read for minutes. Nobody else uses it while nothing is being written."""
        self.saver = AsyncSaver(run.checkpoints, config.keep, self.group, config.asynchronous)
        self.saved = -1
        """The last step that was given to `save`, or taken up."""
        self.remarks: list[str] = []
        """What `resume` has to say: what is redefined, what could not be restored."""

    def resume(self) -> int:
        """Take up the newest whole checkpoint, at whatever world or EP size it was written; the step it is of, 0 for none.

        Raises: CheckpointError if none is whole, or if the config means another run.
        """
        remove_partials(self.root, group=self.group)
        path = save_load.find_latest(self.root, group=self.group)
        if path is None:
            return 0
        extra = save_load.read_manifest_on_all(path, group=self.group).extra
        check_same_run(extra["config"], extra["data"], self.engine.config, self.data.fingerprint)
        mesh, micro_batch = self.engine.mesh, self.engine.batching.micro_batch
        line = describe_changes(
            extra["topology"], mesh.world_size, mesh.ep, micro_batch, self.engine.config
        )
        self.remarks = [line] if line else []
        step = self._restore(path)
        if (
            step == 0
        ):  # not a run's: nothing was drawn, and no group was formed, before it (`training/upcycle.py`)
            self.remarks = []
        return step

    def save(self, step: int) -> None:
        """Save the state after `step` steps; in the background if so configured. Does nothing where it is saved already.

        Raises: CheckpointError on all ranks, of this save or of the one before it, which was still being written.
        """
        if step == self.saved:
            return
        state = training_state(self.engine) | gather_rng_state(self.engine.mesh.control_group)
        self.saver.save(step, state, self._extra(step))
        self.saved = step

    def rollback(self) -> int | None:
        """Go back to the newest whole checkpoint; the step it is of, or None where there is none."""
        self.saver.wait()
        path = save_load.find_latest(self.root, group=self.group)
        if path is None:
            return None
        step = self._restore(path)
        self.guard.rolled_back()
        return step

    @property
    def failed(self) -> bool:
        """A background save has failed on this rank, and nobody has been told. No collective."""
        return self.saver.failed

    def finished(self) -> list[SavedCheckpoint]:
        """The checkpoints that have become complete since the last call. No collective."""
        return self.saver.take_finished()

    def wait(self) -> None:
        """Until nothing is being written. Raises: CheckpointError on all ranks."""
        try:
            self.saver.wait()
        except CheckpointError:
            self.saved = -1  # so that the same step can be saved again: it is not there
            raise

    def close(self) -> None:
        """Wait, and let go of the memory. Raises: CheckpointError on all ranks."""
        self.saver.close()

    def drain(self) -> None:
        """On the way out of an error, when the other ranks may be gone: give the writer a moment. Not collective."""
        self.saver.drain()

    def _restore(self, path: Path) -> int:
        tables, remark = rng_tables(save_load.read_manifest(path), self.group)
        extra = load(self.engine, path, tables)
        set_rng_state(tables, self.group)
        if remark:
            self.remarks.append(remark)
        self.guard.restore(extra.get("guard"))
        self.saved = int(extra["step"])
        return self.saved

    def _extra(self, step: int) -> dict[str, Any]:
        config = self.engine.config
        scaler = self.engine.accelerator.scaler
        return {
            "step": step,
            "tokens": step * self.engine.targets,
            "config": asdict(config),
            "topology": {
                "world": self.engine.process.world_size,
                "ep": self.engine.mesh.ep,
                "virtual_ranks": config.parallel.virtual_ranks,
                "micro_batch": self.engine.batching.micro_batch,
            },
            "data": self.data.fingerprint,
            "guard": self.guard.state(),
            "scaler": None if scaler is None else _plain(scaler.state_dict()),
            "versions": {"dmoe": dmoe.__version__, "torch": torch.__version__},
        }


def load(engine: Engine, path: Path, more: Mapping[str, torch.Tensor] = NOTHING) -> dict[str, Any]:
    """Fill the weights, the optimizer's state, the loss scale and `more` from the checkpoint at `path`; its `extra`. Collective."""
    state = training_state(engine)
    extra = save_load.load(
        path,
        state | dict(more),
        prefix=("model.", "optim.", *more),
        group=engine.mesh.checkpoint_group,
    )
    if "optim.step" in state:
        set_optimizer_step(engine.optimizer, state["optim.step"])
    scaler, scale = engine.accelerator.scaler, extra.get("scaler")
    if scaler is not None and scale is not None:
        scaler.load_state_dict(scale)
    return extra


def training_state(engine: Engine) -> dict[str, torch.Tensor]:
    return model_state(engine.model, engine.mesh) | optimizer_state(
        engine.model, engine.optimizer, engine.mesh
    )


def _plain(state: Mapping[str, Any]) -> dict[str, float]:
    """A gradient scaler's state: the scale, how it grows, and how many good steps it has seen."""
    return {
        key: value.item() if isinstance(value, torch.Tensor) else value
        for key, value in state.items()
    }


class CheckpointScheduler:
    """`checkpoint.every` and `checkpoint.on_error`. Every method is collective; all ranks come to the same end."""

    def __init__(
        self, checkpoints: Checkpointer, logger: RunLogger, config: CheckpointConfig
    ) -> None:
        self.checkpoints, self.logger, self.config = checkpoints, logger, config
        self.overdue = False
        """A checkpoint was due and could not be made yet."""

    def after_step(
        self, done: int, requests: Requests, *, last_step_good: bool, last: bool
    ) -> None:
        """Save if it is due or was asked for, and tell what has become of the save before.

        Nothing is saved in a row of bad steps (`calm` is false): it would push out the checkpoints that the run may have to go back to.
        What was due then is saved after the next good step.
        The `last` step has a save of its own.

        Raises: CheckpointError if a save has failed and `checkpoint.on_error` is stop.
        """
        if requests.failed:
            self.wait_for_pending(done)
        self.overdue |= self.config.every > 0 and done % self.config.every == 0
        if ((last_step_good and self.overdue) or requests.save) and not last:
            self.overdue = False
            self.wait_for_pending(done)
            try:
                self.checkpoints.save(done)
            except CheckpointError as error:
                self._failed(done, error)
        self._tell()

    def save_last(self, done: int) -> None:
        """The state as it is now, on disk for sure, whatever became of the save before. Raises: CheckpointError."""
        self.wait_for_pending(done)
        self.checkpoints.save(done)
        self.checkpoints.close()
        self._tell()

    def wait_for_pending(self, done: int) -> None:
        """Wait for the checkpoint that is still being written, and hear how it went."""
        try:
            self.checkpoints.wait()
        except CheckpointError as error:
            self._failed(done, error)

    def _failed(self, done: int, error: CheckpointError) -> None:
        self.logger.alert(done, "checkpoint failed", f"checkpoint failed: {error}")
        if self.config.on_error == "stop":
            raise error

    def _tell(self) -> None:
        for saved in self.checkpoints.take_finished():
            values = {
                "seconds": saved.seconds,
                "held": saved.blocking_seconds,
                "bytes": saved.bytes,
            }
            self.logger.log_event("checkpoint", saved.step, values)
