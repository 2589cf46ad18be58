"""When a checkpoint is due, and what one that fails does to the run."""

from __future__ import annotations

from dmoe.config.errors import CheckpointError
from dmoe.config.schema import CheckpointConfig
from dmoe.training.checkpointing import Checkpointer
from dmoe.training.totals import Requests
from dmoe.training.voice import RunLogger

__all__ = ["CheckpointScheduler"]


class CheckpointScheduler:
    """`checkpoint.every` and `checkpoint.on_error`. Every method is collective; all ranks come to the same end."""

    def __init__(self, checkpoints: Checkpointer, logger: RunLogger, config: CheckpointConfig) -> None:
        self.checkpoints, self.logger, self.config = checkpoints, logger, config
        self.overdue = False
        """A checkpoint was due and could not be made yet."""

    def after_step(self, done: int, requests: Requests, *, last_step_good: bool, last: bool) -> None:
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
        for saved in self.checkpoints.finished():
            values = {"seconds": saved.seconds, "held": saved.seconds_held, "bytes": saved.bytes}
            self.logger.log_event("checkpoint", saved.step, values)
