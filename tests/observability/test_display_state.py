"""State of the display: the resume rule, and the pace."""

from __future__ import annotations

import pytest

from dmoe.observability.display.state import DisplayState


def test_repeated_steps_of_a_resumed_run_are_void() -> None:
    state = DisplayState(200)
    for step in range(1, 10):
        state.on_event("train", step, {"loss": 5 / step}, float(step))
    state.on_event("eval", 9, {"loss": 2.6}, 8.0)
    state.on_event("alert", 9, {"text": "dead experts: many"}, None)
    state.on_event("restart", 4, {"resumed_from": 4}, 100.0)
    assert state.step == 4
    assert [mark.step for mark in state.losses] == [1, 2, 3, 4]
    assert not state.evaluations
    assert state.values == {"loss": 5 / 4}
    assert state.alerts, "alerts stay"


@pytest.mark.parametrize(("event", "kept"), [("start", []), ("restart", []), ("rollback", [0])])
def test_evaluation_at_step_0_is_void_after_a_new_start(event: str, kept: list[int]) -> None:
    """The curve had two points at step 0, of a killed start and of the next, with other weights.

    A rollback to step 0, possible in an upcycled run, restores the same weights.
    """
    state = DisplayState(200)
    state.on_event("eval", 0, {"loss": 5.5}, 1.0)
    state.on_event("train", 1, {"loss": 5.4}, 2.0)
    state.on_event(event, 0, {"resumed_from": 0}, 3.0)
    assert [mark.step for mark in state.evaluations] == kept
    assert not state.losses


def test_time_left_uses_the_pace_of_this_attempt() -> None:
    state = DisplayState(100)
    assert state.seconds_left(0.0) is None
    state.on_step(10, 1000.0)
    state.on_step(20, 1020.0)
    assert state.seconds_left(1020.0) == 160
    assert state.seconds_left(1030.0) == 150
    state.on_event("restart", 15, {"resumed_from": 15}, 5000.0)
    assert state.seconds_left(5000.0) is None, "the hour without a process does not count"
    state.on_step(16, 5001.0)
    state.on_step(20, 5005.0)
    assert state.seconds_left(5005.0) == 80
