"""Checkpoints of a run: what they hold, how a run resumes and rolls back, and when one is saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import dmoe
from dmoe.checkpoint import save_load
from dmoe.checkpoint.async_saver import AsyncSaver, SavedCheckpoint
from dmoe.checkpoint.rng_state import gather_rng_state, rng_tables, set_rng_state
from dmoe.checkpoint.save_load import remove_partials
from dmoe.config.changes import describe_changes, describe_learning_rate
from dmoe.config.errors import CheckpointError
from dmoe.config.schema import CheckpointConfig
from dmoe.distributed.data_parallel import scaler_numbers
from dmoe.distributed.state_dict import model_state, optimizer_state, set_optimizer_step
from dmoe.observability.logger import RunLogger
from dmoe.runs.directory import RunDir
from dmoe.train.engine import Engine
from dmoe.train.reduction import Requests
from dmoe.train.restore import check_same_run
from dmoe.train.step_guard import StepGuard
from dmoe.train.tasks import DataSplits


class Checkpointer:
    """The checkpoints of one run. Collective but for `failed`, `take_finished` and `drain`.

    A step is the number of optimizer steps done. Data order, learning rate and all random numbers
    are functions of it.
    """

    def __init__(
        self, engine: Engine, data: DataSplits, run: RunDir, step_guard: StepGuard
    ) -> None:
        """Collect what a checkpoint holds.

        Args:
            engine: model, optimizer, loss scale and config.
            data: its fingerprint is saved, and must be equal where the run resumes.
            run: the run directory.
            step_guard: its state is saved too.
        """
        self.engine, self.data, self.step_guard = engine, data, step_guard
        self.root, self.group = run.checkpoints, engine.mesh.checkpoint_group
        """`group` has a long timeout, since rank 0 may read for minutes. The writer's thread uses
        it while a checkpoint is being written; nothing else may then."""
        config = engine.config.checkpoint
        self.saver = AsyncSaver(run.checkpoints, config.keep, self.group, config.asynchronous)
        self.last_saved_step = -1
        """The last step that was passed to `save`, or restored."""
        self.before_save: Callable[[], None] = lambda: None
        """Writes what must not be behind a checkpoint. Collective."""
        self.tokens = 0
        """Tokens of all steps until now, without padding: of this process and those before it."""
        self.notes: list[str] = []
        """Notes of `resume`: what the new config redefines, and what could not be restored."""

    def resume(self) -> int:
        """Restore the newest intact checkpoint; return its step, or 0 if there is none.

        The world size and the expert-parallel size may differ from those it was written with.

        Raises CheckpointError if none is intact, or the config describes another run.
        """
        remove_partials(self.root, group=self.group)
        path = save_load.find_latest(self.root, group=self.group)
        if path is None:
            return 0
        config, mesh = self.engine.config, self.engine.mesh
        extra = save_load.read_manifest_on_all(path, group=self.group).extra
        check_same_run(extra["config"], extra["data"], config, self.data.fingerprint)
        line = describe_changes(
            extra["topology"],
            mesh.world_size,
            mesh.ep,
            self.engine.batching.micro_batch,
            config.moe,
        )
        step = self._restore(path)
        rate = describe_learning_rate(extra["config"], config, step)
        self.notes = [note for note in (line, rate) if note] + self.notes
        if step == 0:
            # Written by `dmoe upcycle`, not by a run: no random numbers were drawn and no batch was
            # formed before it, so nothing is redefined.
            self.notes = []
        return step

    def save(self, step: int) -> None:
        """Save the state after `step` steps, unless it is saved already.

        With `checkpoint.asynchronous` the files are written in the background.

        Raises CheckpointError on all ranks, of this save or of the previous one if that was still
        being written.
        """
        self.before_save()
        if step == self.last_saved_step:
            return
        extra = self._extra(step)
        with self.engine.contiguous_experts():
            state = train_state(self.engine) | gather_rng_state(self.engine.mesh.control_group)
            self.saver.save(step, state, extra)
        self.last_saved_step = step

    def rollback(self) -> int | None:
        """Restore the newest intact checkpoint; return its step, or None if there is none."""
        self.saver.wait()
        path = save_load.find_latest(self.root, group=self.group)
        if path is None:
            return None
        step = self._restore(path)
        self.step_guard.reset_count()
        return step

    @property
    def failed(self) -> bool:
        """A background save has failed on this rank, and that is not reported yet."""
        return self.saver.failed

    def take_finished(self) -> list[SavedCheckpoint]:
        """Return the checkpoints that have become complete since the last call."""
        return self.saver.take_finished()

    def wait(self) -> None:
        """Wait for the background save. Raises CheckpointError on all ranks."""
        try:
            self.saver.wait()
        except CheckpointError:
            # Not on disk: `save` must accept the same step again.
            self.last_saved_step = -1
            raise

    def close(self) -> None:
        """Wait for the background save and free its memory. Raises CheckpointError on all ranks."""
        self.saver.close()

    def drain(self) -> None:
        """Give the writer a moment, after an error that other ranks may not have survived."""
        self.saver.drain()

    def _restore(self, path: Path) -> int:
        rng_state, note = rng_tables(save_load.read_manifest(path), self.group)
        extra = load_training_state(self.engine, path, rng_state)
        set_rng_state(rng_state, self.group)
        if self.engine.placement is not None:
            self.engine.placement.load_state_dict(extra.get("placement"))
        if note:
            self.notes.append(note)
        self.step_guard.load_state_dict(extra.get("guard"))
        self.last_saved_step = int(extra["step"])
        self.tokens = int(extra["tokens"])
        return self.last_saved_step

    def _extra(self, step: int) -> dict[str, Any]:
        """Return the JSON part of a checkpoint. Its keys are part of the file format."""
        engine, scaler = self.engine, self.engine.accelerator.scaler
        placement = engine.placement
        return {
            **({} if placement is None else {"placement": placement.state_dict()}),
            "step": step,
            "tokens": self.tokens,
            "config": asdict(engine.config),
            "topology": {
                "world": engine.process.world_size,
                "ep": engine.mesh.ep,
                "virtual_ranks": engine.config.parallel.virtual_ranks,
                "micro_batch": engine.batching.micro_batch,
            },
            "data": self.data.fingerprint,
            "model": engine.own_model,
            "guard": self.step_guard.state_dict(),
            "scaler": None if scaler is None else scaler_numbers(scaler.state_dict()),
            "versions": {"dmoe": dmoe.__version__, "torch": torch.__version__},
        }


def load_training_state(
    engine: Engine, path: Path, extra_tensors: Mapping[str, torch.Tensor] | None = None
) -> dict[str, Any]:
    """Load weights, optimizer state and loss scale of a checkpoint in place. Collective.

    Args:
        engine: its model, optimizer and loss scale are filled.
        path: the checkpoint.
        extra_tensors: further tensors to fill, by their names in the checkpoint.

    Returns:
        The checkpoint's `extra`: step, config, guard and so on.
    """
    if engine.placement is not None:
        engine.placement.make_contiguous()
    state, more = train_state(engine), dict(extra_tensors or {})
    prefix, group = ("model.", "optim.", *more), engine.mesh.checkpoint_group
    extra = save_load.load(path, state | more, prefix=prefix, group=group)
    if "optim.step" in state:
        set_optimizer_step(engine.optimizer, state["optim.step"])
    scaler, scale = engine.accelerator.scaler, extra.get("scaler")
    if scaler is not None and scale is not None:
        scaler.load_state_dict(scale)
    return extra


def train_state(engine: Engine) -> dict[str, torch.Tensor]:
    """Return weights, buffers and optimizer state by their names in a checkpoint."""
    assert engine.placement is None or engine.placement.is_contiguous, "experts are out of order"
    model, mesh = engine.model, engine.mesh
    return model_state(model, mesh) | optimizer_state(model, engine.optimizer, mesh)


class CheckpointScheduler:
    """Saves when `checkpoint.every` says so or a signal asks; handles `checkpoint.on_error`.

    Every method is collective, and all ranks decide alike.
    """

    def __init__(
        self, checkpointer: Checkpointer, logger: RunLogger, config: CheckpointConfig
    ) -> None:
        self.checkpointer, self.logger, self.config = checkpointer, logger, config
        self.overdue = False
        """A checkpoint was due and could not be saved yet."""
        self.num_open = 0
        """Saves that were started, and have neither failed nor been logged as complete."""

    @property
    def failed(self) -> bool:
        """A background save has failed on this rank, and that is not reported yet. Local."""
        return self.num_open > 0 and self.checkpointer.failed

    def after_step(
        self, step: int, requests: Requests, *, last_step_good: bool, last: bool
    ) -> None:
        """Save if that is due or requested, and log the saves that have completed.

        During bad steps nothing is saved, since that would delete the checkpoints that the run may
        have to roll back to. What was due then is saved after the next good step. The last step has
        a save of its own (`save_final`).

        Args:
            step: optimizer steps done.
            requests: the requests of all ranks.
            last_step_good: whether the step guard found nothing wrong with the last step.
            last: whether it was the last step of the run.

        Raises CheckpointError if a save has failed and `checkpoint.on_error` is stop.
        """
        if requests.failed:
            self.wait_for_pending(step)
        self.overdue |= self.config.every > 0 and step % self.config.every == 0
        if ((last_step_good and self.overdue) or requests.save) and not last:
            self.overdue = False
            self.wait_for_pending(step)
            try:
                self.checkpointer.save(step)
                self.num_open += 1
            except CheckpointError as error:
                self._handle_failure(step, error)
        self._log_completed()

    def save_final(self, step: int) -> None:
        """Save the state and wait until it is on disk, whatever became of the previous save.

        Raises CheckpointError.
        """
        self.wait_for_pending(step)
        self.checkpointer.save(step)
        self.num_open += 1
        self.checkpointer.close()
        self._log_completed()

    def wait_for_pending(self, step: int) -> None:
        """Wait for the checkpoint that is being written, and handle its failure."""
        try:
            self.checkpointer.wait()
        except CheckpointError as error:
            self.num_open -= 1
            self._handle_failure(step, error)

    def _handle_failure(self, step: int, error: CheckpointError) -> None:
        self.logger.alert(step, "checkpoint failed", f"checkpoint failed: {error}")
        if self.config.on_error == "stop":
            raise error

    def _log_completed(self) -> None:
        if not self.num_open:
            return
        for saved in self.checkpointer.take_finished():
            self.num_open -= 1
            values = {
                "seconds": saved.seconds,
                "held": saved.blocking_seconds,
                "bytes": saved.bytes,
            }
            self.logger.log_event("checkpoint", saved.step, values)
