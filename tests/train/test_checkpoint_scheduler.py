"""When a checkpoint is saved, and what a failed save does to the run."""

from __future__ import annotations

from typing import Any, cast

import pytest

from dmoe.checkpoint.async_saver import SavedCheckpoint
from dmoe.config.errors import CheckpointError
from dmoe.config.schema import CheckpointConfig
from dmoe.observability.logger import RunLogger
from dmoe.train.checkpointer import Checkpointer, CheckpointScheduler
from dmoe.train.reduction import Requests

NONE, SAVE, FAILED = Requests(), Requests(save=True), Requests(failed=True)


class FakeCheckpointer:
    """Records its calls. Saves of steps in `broken` fail at once, or (background) in the next wait."""

    def __init__(self, *broken: int, background: bool = False) -> None:
        self.broken, self.background, self.calls = broken, background, list[str]()
        self.error: CheckpointError | None = None
        self.done: list[SavedCheckpoint] = []

    def save(self, step: int) -> None:
        self.wait()
        self.calls.append(f"save {step}")
        if step in self.broken:
            self.error = CheckpointError(f"step {step} is broken")
            if not self.background:
                self.wait()
        else:
            self.done.append(SavedCheckpoint(step, 0.1, 0.2, 300))

    def wait(self) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error

    def close(self) -> None:
        self.wait()
        self.calls.append("close")

    def take_finished(self) -> list[SavedCheckpoint]:
        found, self.done = self.done, []
        return found


class FakeLogger:
    def __init__(self) -> None:
        self.logged: list[tuple[str, int]] = []

    def alert(self, step: int, title: str, text: str) -> None:
        self.logged.append((text, step))

    def log_event(self, event: str, step: int, values: dict[str, Any], line: str = "") -> None:
        assert values == {"seconds": 0.2, "held": 0.1, "bytes": 300}
        self.logged.append((event, step))


def scheduler_of(
    checkpointer: FakeCheckpointer, **config: Any
) -> tuple[CheckpointScheduler, FakeLogger]:
    logger = FakeLogger()
    return CheckpointScheduler(
        cast(Checkpointer, checkpointer), cast(RunLogger, logger), CheckpointConfig(**config)
    ), logger


def run(
    scheduler: CheckpointScheduler, steps: int, requests: dict[int, Requests] | None = None
) -> None:
    for done in range(1, steps + 1):
        scheduler.after_step(
            done, (requests or {}).get(done, NONE), last_step_good=True, last=done == steps
        )
    scheduler.save_final(steps)


@pytest.mark.parametrize(
    ("every", "steps"),
    [(4, [4, 8, 10]), (5, [5, 10]), (0, [10]), (99, [10]), (1, list(range(1, 11)))],
)
def test_saved_every_n_steps_and_once_at_the_end(every: int, steps: list[int]) -> None:
    checkpointer = FakeCheckpointer()
    scheduler, logger = scheduler_of(checkpointer, every=every)
    run(scheduler, 10)
    assert checkpointer.calls == [*(f"save {step}" for step in steps), "close"]
    assert logger.logged == [("checkpoint", step) for step in steps]


def test_saved_on_request_but_not_twice() -> None:
    checkpointer = FakeCheckpointer()
    scheduler, _ = scheduler_of(checkpointer, every=4)
    run(scheduler, 10, {2: SAVE, 4: SAVE, 10: SAVE})
    assert checkpointer.calls == ["save 2", "save 4", "save 8", "save 10", "close"]


@pytest.mark.parametrize("background", [False, True])
def test_failed_save_ends_the_run(background: bool) -> None:
    checkpointer = FakeCheckpointer(4, background=background)
    scheduler, logger = scheduler_of(checkpointer, every=4)
    with pytest.raises(CheckpointError, match="step 4 is broken"):
        run(scheduler, 10, {5: FAILED} if background else None)
    assert checkpointer.calls == ["save 4"]
    assert logger.logged == [("checkpoint failed: step 4 is broken", 5 if background else 4)]


@pytest.mark.parametrize("background", [False, True])
def test_failed_save_with_on_error_continue(background: bool) -> None:
    checkpointer = FakeCheckpointer(4, background=background)
    scheduler, logger = scheduler_of(checkpointer, every=4, on_error="continue")
    run(scheduler, 10, {5: FAILED} if background else None)
    assert checkpointer.calls == ["save 4", "save 8", "save 10", "close"]
    failed = ("checkpoint failed: step 4 is broken", 5 if background else 4)
    assert logger.logged == [failed, ("checkpoint", 8), ("checkpoint", 10)]


def test_unreported_failure_does_not_block_the_next_save() -> None:
    """`save` fails while an earlier error is pending; the step that is due must not be lost too."""
    checkpointer = FakeCheckpointer(4, background=True)
    scheduler, logger = scheduler_of(checkpointer, every=4, on_error="continue")
    run(scheduler, 10)
    assert checkpointer.calls == ["save 4", "save 8", "save 10", "close"]
    assert logger.logged[0] == ("checkpoint failed: step 4 is broken", 8)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_final_save_must_succeed(policy: str, background: bool) -> None:
    checkpointer = FakeCheckpointer(10, background=background)
    scheduler, _ = scheduler_of(checkpointer, every=4, on_error=policy)
    with pytest.raises(CheckpointError, match="step 10 is broken"):
        run(scheduler, 10)
    assert "close" not in checkpointer.calls


def test_save_due_on_a_bad_step_follows_after_the_next_good_step() -> None:
    """Once it waited for the next multiple: with `every: 300`, a spike put 600 steps at risk."""
    checkpointer = FakeCheckpointer()
    scheduler, _ = scheduler_of(checkpointer, every=4)
    for done in range(1, 11):
        scheduler.after_step(done, NONE, last_step_good=done not in (4, 5), last=False)
    assert checkpointer.calls == ["save 6", "save 8"]
