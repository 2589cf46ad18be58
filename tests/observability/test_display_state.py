"""What a display remembers of a run: what a restart makes void, and the pace."""

from __future__ import annotations

import pytest

from dmoe.observability.display.state import DisplayState


def test_what_a_resumed_run_does_again_is_void() -> None:
    state = DisplayState(200)
    for step in range(1, 10):
        state.on_event("train", step, {"loss": 5 / step}, float(step))
    state.on_event("eval", 9, {"loss": 2.6}, 8.0)
    state.on_event("alert", 9, {"text": "dead experts: many"}, None)
    state.on_event("restart", 4, {"resumed_from": 4}, 100.0)
    assert state.step == 4
    assert [mark.step for mark in state.losses] == [1, 2, 3, 4]
    assert not state.held_out
    assert state.values == {"loss": 5 / 4}
    assert state.alerts, "what was said stays"


@pytest.mark.parametrize(("event", "kept"), [("start", []), ("restart", []), ("rollback", [0])])
def test_an_evaluation_before_the_first_step_is_of_one_start(event: str, kept: list[int]) -> None:
    """The curve showed two points at step 0: of the start that was killed, and of the one that began anew, perhaps with other weights.
    Going back to step 0, as an upcycled run can, goes back to the same ones."""
    state = DisplayState(200)
    state.on_event("eval", 0, {"loss": 5.5}, 1.0)
    state.on_event("train", 1, {"loss": 5.4}, 2.0)
    state.on_event(event, 0, {"resumed_from": 0}, 3.0)
    assert [mark.step for mark in state.held_out] == kept
    assert not state.losses


def test_time_left_is_by_the_pace_of_this_attempt() -> None:
    state = DisplayState(100)
    assert state.left(0.0) is None
    state.reached(10, 1000.0)
    state.reached(20, 1020.0)
    assert state.left(1020.0) == 160
    assert state.left(1030.0) == 150
    state.on_event("restart", 15, {"resumed_from": 15}, 5000.0)
    assert state.left(5000.0) is None, "the hour that nobody trained is no pace"
    state.reached(16, 5001.0)
    state.reached(20, 5005.0)
    assert state.left(5005.0) == 80
