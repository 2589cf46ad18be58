"""When a checkpoint is due, and what one that fails does to the run."""

from __future__ import annotations

from typing import Any, cast

import pytest

from dmoe.checkpoint.async_saver import SavedCheckpoint
from dmoe.config.errors import CheckpointError
from dmoe.config.schema import CheckpointConfig
from dmoe.observability.logger import RunLogger
from dmoe.train.checkpointer import Checkpointer, CheckpointScheduler
from dmoe.train.reduction import Requests

NOTHING, SAVE, FAILED = Requests(), Requests(save=True), Requests(failed=True)


class FakeCheckpoints:
    """Writes down what it is asked. A save of a step in `broken` fails, at once or (background) in the next call that waits."""

    def __init__(self, *broken: int, background: bool = False) -> None:
        self.broken, self.background, self.asked = broken, background, list[str]()
        self.error: CheckpointError | None = None
        self.done: list[SavedCheckpoint] = []

    def save(self, step: int) -> None:
        self.wait()
        self.asked.append(f"save {step}")
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
        self.asked.append("close")

    def finished(self) -> list[SavedCheckpoint]:
        found, self.done = self.done, []
        return found


class FakeVoice:
    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def alert(self, step: int, title: str, text: str) -> None:
        self.told.append((text, step))

    def log_event(self, event: str, step: int, values: dict[str, Any], line: str = "") -> None:
        assert values == {"seconds": 0.2, "held": 0.1, "bytes": 300}
        self.told.append((event, step))


def keeper(checkpoints: FakeCheckpoints, **config: Any) -> tuple[CheckpointScheduler, FakeVoice]:
    voice = FakeVoice()
    return CheckpointScheduler(
        cast(Checkpointer, checkpoints), cast(RunLogger, voice), CheckpointConfig(**config)
    ), voice


def run(made: CheckpointScheduler, steps: int, asked: dict[int, Requests] | None = None) -> None:
    for done in range(1, steps + 1):
        made.after_step(
            done, (asked or {}).get(done, NOTHING), last_step_good=True, last=done == steps
        )
    made.save_last(steps)


@pytest.mark.parametrize(
    ("every", "steps"),
    [(4, [4, 8, 10]), (5, [5, 10]), (0, [10]), (99, [10]), (1, list(range(1, 11)))],
)
def test_every_so_many_steps_and_at_the_end_once(every: int, steps: list[int]) -> None:
    checkpoints = FakeCheckpoints()
    made, voice = keeper(checkpoints, every=every)
    run(made, 10)
    assert checkpoints.asked == [*(f"save {step}" for step in steps), "close"]
    assert voice.told == [("checkpoint", step) for step in steps]


def test_on_request_too_but_not_twice() -> None:
    checkpoints = FakeCheckpoints()
    made, _ = keeper(checkpoints, every=4)
    run(made, 10, {2: SAVE, 4: SAVE, 10: SAVE})
    assert checkpoints.asked == ["save 2", "save 4", "save 8", "save 10", "close"]


@pytest.mark.parametrize("background", [False, True])
def test_a_save_that_fails_ends_the_run(background: bool) -> None:
    checkpoints = FakeCheckpoints(4, background=background)
    made, voice = keeper(checkpoints, every=4)
    with pytest.raises(CheckpointError, match="step 4 is broken"):
        run(made, 10, {5: FAILED} if background else None)
    assert checkpoints.asked == ["save 4"]
    assert voice.told == [("checkpoint failed: step 4 is broken", 5 if background else 4)]


@pytest.mark.parametrize("background", [False, True])
def test_or_does_not_where_the_run_may_go_on(background: bool) -> None:
    checkpoints = FakeCheckpoints(4, background=background)
    made, voice = keeper(checkpoints, every=4, on_error="continue")
    run(made, 10, {5: FAILED} if background else None)
    assert checkpoints.asked == ["save 4", "save 8", "save 10", "close"]
    failed = ("checkpoint failed: step 4 is broken", 5 if background else 4)
    assert voice.told == [failed, ("checkpoint", 8), ("checkpoint", 10)]


def test_what_nobody_was_told_of_does_not_keep_the_next_save_from_starting() -> None:
    """`save` refuses to start while an error is waiting; the step that is due must not be lost with the one before."""
    checkpoints = FakeCheckpoints(4, background=True)
    made, voice = keeper(checkpoints, every=4, on_error="continue")
    run(made, 10)
    assert checkpoints.asked == ["save 4", "save 8", "save 10", "close"]
    assert voice.told[0] == ("checkpoint failed: step 4 is broken", 8)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_the_last_save_has_to_succeed(policy: str, background: bool) -> None:
    checkpoints = FakeCheckpoints(10, background=background)
    made, _ = keeper(checkpoints, every=4, on_error=policy)
    with pytest.raises(CheckpointError, match="step 10 is broken"):
        run(made, 10)
    assert "close" not in checkpoints.asked


def test_what_was_due_on_a_bad_step_is_saved_after_the_next_good_one() -> None:
    """It was dropped until the next multiple: with `every: 300` and one spike on step 300, 600 steps were at stake."""
    checkpoints = FakeCheckpoints()
    made, _ = keeper(checkpoints, every=4)
    for done in range(1, 11):
        made.after_step(done, NOTHING, last_step_good=done not in (4, 5), last=False)
    assert checkpoints.asked == ["save 6", "save 8"]
