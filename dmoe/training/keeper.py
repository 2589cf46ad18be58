"""When a checkpoint is due, and what one that fails does to the run."""

from __future__ import annotations

from dmoe.config.errors import CheckpointError
from dmoe.config.schema import CheckpointConfig
from dmoe.training.checkpointing import Checkpoints
from dmoe.training.totals import Requests
from dmoe.training.voice import Voice

__all__ = ["Keeper"]


class Keeper:
    """`checkpoint.every` and `checkpoint.on_error`. Every method is collective; all ranks come to the same end."""

    def __init__(self, checkpoints: Checkpoints, voice: Voice, config: CheckpointConfig) -> None:
        self.checkpoints, self.voice, self.config = checkpoints, voice, config
        self.owed = False
        """A checkpoint was due and could not be made yet."""

    def after_step(self, done: int, requests: Requests, *, calm: bool, last: bool) -> None:
        """Save if it is due or was asked for, and tell what has become of the save before.

        Nothing is saved in a row of bad steps (`calm` is false): it would push out the checkpoints that the run may have to go back to.
        What was due then is saved after the next good step.
        The `last` step has a save of its own.

        Raises: CheckpointError if a save has failed and `checkpoint.on_error` is stop.
        """
        if requests.failed:
            self.settle(done)
        self.owed |= self.config.every > 0 and done % self.config.every == 0
        if ((calm and self.owed) or requests.save) and not last:
            self.owed = False
            self.settle(done)
            try:
                self.checkpoints.save(done)
            except CheckpointError as error:
                self._failed(done, error)
        self._tell()

    def save_last(self, done: int) -> None:
        """The state as it is now, on disk for sure, whatever became of the save before. Raises: CheckpointError."""
        self.settle(done)
        self.checkpoints.save(done)
        self.checkpoints.close()
        self._tell()

    def settle(self, done: int) -> None:
        """Wait for the checkpoint that is still being written, and hear how it went."""
        try:
            self.checkpoints.wait()
        except CheckpointError as error:
            self._failed(done, error)

    def _failed(self, done: int, error: CheckpointError) -> None:
        self.voice.alert(done, "checkpoint failed", f"checkpoint failed: {error}")
        if self.config.on_error == "stop":
            raise error

    def _tell(self) -> None:
        for saved in self.checkpoints.finished():
            values = {"seconds": saved.seconds, "held": saved.seconds_held, "bytes": saved.bytes}
            self.voice.tell("checkpoint", saved.step, values)
