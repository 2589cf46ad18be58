"""Step guard: what is bad, what is done about it, and its state in a checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoe.config.schema import GuardConfig
from dmoe.train.step_guard import StepAction, StepGuard, StepHealth

WINDOW = 8
CONFIG = GuardConfig(spike_window=WINDOW, patience=3)
NAN, INF = math.nan, math.inf


def guard(scaled: bool = False, **changes: Any) -> StepGuard:
    """Make a guard that has seen eight losses around 2."""
    made = StepGuard(replace(CONFIG, **changes), scaled)
    for step in range(WINDOW):
        assert made.check(step, 2.0 + 0.01 * (-1) ** step, 1.0) == (
            StepHealth.GOOD,
            StepAction.APPLY,
        )
    return made


def actions(made: StepGuard, *losses: float, first: int = WINDOW) -> list[StepAction]:
    return [made.check(first + i, loss, 1.0)[1] for i, loss in enumerate(losses)]


TAKE, SKIP, ROLLBACK, STOP = StepAction.APPLY, StepAction.SKIP, StepAction.ROLLBACK, StepAction.STOP


@pytest.mark.parametrize(
    ("loss", "norm"), [(NAN, 1.0), (INF, 1.0), (-INF, 1.0), (2.0, NAN), (2.0, INF), (NAN, NAN)]
)
def test_a_loss_or_a_norm_that_is_not_finite(loss: float, norm: float) -> None:
    assert guard().check(WINDOW, loss, norm) == (StepHealth.NONFINITE, SKIP)


def test_a_spike_is_above_the_mean_never_below() -> None:
    for loss in (2.0, 2.05, 0.1, -9.0):
        assert guard().check(WINDOW, loss, 1.0)[0] is StepHealth.GOOD, loss
    for loss in (2.07, 50.0):
        assert guard().check(WINDOW, loss, 1.0)[0] is StepHealth.SPIKE, loss


def test_two_percent_are_no_spike() -> None:
    """Equal losses have no deviation: any rounding would be a spike."""
    calm = StepGuard(CONFIG)
    for step in range(WINDOW):
        calm.check(step, 2.0, 1.0)
    assert calm.check(WINDOW, 2.039, 1.0)[0] is StepHealth.GOOD
    assert calm.check(WINDOW + 1, 2.1, 1.0)[0] is StepHealth.SPIKE


@pytest.mark.parametrize(("window", "needed"), [(64, 16), (8, 2), (4, 2), (1, None)])
def test_nothing_is_a_spike_before_a_quarter_of_the_window_is_known(
    window: int, needed: int | None
) -> None:
    for known in range(window + 1):
        made = StepGuard(replace(CONFIG, spike_window=window))
        for step in range(known):
            made.check(step, 2.0, 1.0)
        assert (made.check(known, 99.0, 1.0)[0] is StepHealth.SPIKE) == (
            needed is not None and known >= needed
        )


def test_bad_losses_are_not_in_the_history() -> None:
    made = guard(spike="warn", patience=99)
    for step in range(WINDOW, 3 * WINDOW):
        assert made.check(step, 50.0, 1.0) == (StepHealth.SPIKE, TAKE), (
            "the spikes would have become the rule"
        )


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("skip", [SKIP, SKIP, ROLLBACK]),
        ("rollback", [ROLLBACK, STOP]),
        ("stop", [STOP]),
    ],
)
def test_policies_for_numbers_that_are_not_finite(policy: str, expected: list[StepAction]) -> None:
    assert actions(guard(nonfinite=policy), *[NAN] * len(expected)) == expected


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("warn", [TAKE, TAKE, STOP]),
        ("skip", [SKIP, SKIP, STOP]),
        ("rollback", [ROLLBACK, STOP]),
        ("stop", [STOP]),
    ],
)
def test_policies_for_spikes(policy: str, expected: list[StepAction]) -> None:
    assert actions(guard(spike=policy), *[9.0] * len(expected)) == expected


def test_a_good_step_resets_the_count() -> None:
    assert actions(guard(), NAN, NAN, 2.0, NAN, NAN, 2.0, NAN) == [
        SKIP,
        SKIP,
        TAKE,
        SKIP,
        SKIP,
        TAKE,
        SKIP,
    ]


def test_nan_counts_as_a_spike() -> None:
    assert actions(guard(), NAN, NAN, 9.0) == [SKIP, SKIP, STOP]
    assert actions(guard(), 9.0, 9.0, NAN) == [TAKE, TAKE, ROLLBACK]


def test_a_second_rollback_to_one_place_stops() -> None:
    """Rolled back from step 10 to 8, the same steps are bad again: a second rollback is no help."""
    made = guard()
    assert actions(made, NAN, NAN, NAN) == [SKIP, SKIP, ROLLBACK]
    made.reset_count()
    assert actions(made, NAN, NAN, NAN) == [SKIP, SKIP, STOP]


def test_a_rollback_is_allowed_again_once_the_place_is_passed() -> None:
    made = guard()
    assert actions(made, NAN, NAN, NAN) == [SKIP, SKIP, ROLLBACK]
    made.reset_count()
    assert actions(made, 2.0, 2.0, 2.0, NAN, NAN, NAN) == [TAKE] * 3 + [SKIP, SKIP, STOP], (
        "step 10 itself is not beyond it"
    )
    made = guard()
    actions(made, NAN, NAN, NAN)
    made.reset_count()
    assert actions(made, 2.0, 2.0, 2.0, 2.0, NAN, NAN, NAN) == [TAKE] * 4 + [SKIP, SKIP, ROLLBACK]


def test_overflows_under_loss_scaling_are_skipped_up_to_patience() -> None:
    for policy in ("skip", "stop", "rollback"):
        assert actions(guard(scaled=True, nonfinite=policy), NAN, NAN, NAN) == [
            SKIP,
            SKIP,
            ROLLBACK,
        ]


losses = st.lists(
    st.one_of(st.floats(1.0, 3.0), st.sampled_from([NAN, INF, 9.0, 1e30])), max_size=40
)
policies = st.builds(
    replace,
    st.just(CONFIG),
    nonfinite=st.sampled_from(["skip", "stop", "rollback"]),
    spike=st.sampled_from(["warn", "skip", "stop"]),
)


@given(before=losses, after=losses, config=policies)
def test_a_resumed_guard_decides_as_an_uninterrupted_one(
    before: list[float], after: list[float], config: GuardConfig
) -> None:
    """Through JSON, as in the manifest."""
    unbroken, resumed = StepGuard(config), StepGuard(config)
    for step, loss in enumerate(before):
        unbroken.check(step, loss, 1.0)
    resumed.load_state_dict(json.loads(json.dumps(unbroken.state_dict())))
    for step, loss in enumerate(after, len(before)):
        assert resumed.check(step, loss, 1.0) == unbroken.check(step, loss, 1.0)


def test_an_older_checkpoint_does_not_undo_the_rollback() -> None:
    made = guard()
    before = made.state_dict()
    assert actions(made, NAN, NAN, NAN)[-1] is ROLLBACK
    made.load_state_dict(before)
    made.reset_count()
    assert actions(made, NAN, NAN, NAN)[-1] is STOP


def test_a_checkpoint_without_state_resets_the_guard() -> None:
    made = guard()
    made.load_state_dict(None)
    assert made.state_dict() == StepGuard(CONFIG).state_dict()


def test_the_rollback_is_saved_in_the_checkpoint() -> None:
    """Once it was not saved: killed and resumed in between, the run rolled back a second time."""
    made = guard()
    assert actions(made, NAN, NAN, NAN)[-1] is ROLLBACK
    made.reset_count()
    resumed = StepGuard(CONFIG)
    resumed.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert actions(resumed, NAN, NAN, NAN)[-1] is STOP
