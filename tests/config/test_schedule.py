"""The learning rate in words: what is said happens, and what does not happen is said."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest

from dmoe.config.schedule import decay_steps, describe_schedule, learning_rate, schedule_remarks
from dmoe.explain import explain
from tests.tiny import tiny

WARMUPS = (0, 1, 5, 9, 10, 11, 50)
SCHEDULES = (
    "cosine",
    "linear",
    "constant",
    "inverse_sqrt",
    *(f"wsd optim.decay_fraction={share}" for share in (0, 0.04, 0.2, 0.6, 1)),
)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", WARMUPS)
def test_the_sentence_is_what_the_schedule_does(warmup: int, schedule: str) -> None:
    """A warm-up of 50 steps in a run of 10 was "to 0.004; training ends before any decay", and wsd
    promised a decay over steps that the warm-up takes, or over none."""
    config = tiny(f"optim.warmup={warmup}", *f"optim.schedule={schedule}".split())
    optim, steps = config.optim, config.train.steps
    rates = [learning_rate(step, steps, optim) for step in range(steps)]
    text = describe_schedule(optim, steps)
    remark = "".join(schedule_remarks(optim, steps))
    assert (max(rates) == pytest.approx(optim.lr)) == ("never reaches" not in text)
    falls = sum(b < a for a, b in pairwise(rates))
    assert decay_steps(optim, steps) in (falls, falls + 1)
    assert bool(falls) == bool(re.search(r"cosine to|linear to|step\) to", text))
    if falls:
        assert f"{rates[-1]:g} at step 10" in text
        lowest = optim.min_lr_ratio
        if schedule == "inverse_sqrt":
            lowest = max(lowest, math.sqrt(max(1, warmup) / steps))
        assert rates[-1] == pytest.approx(optim.lr * lowest)
    if "never reaches" in text:
        assert f"it ends at {rates[-1]:g} and never reaches" in text
        assert remark.startswith(f"optim.warmup={warmup}: the run has 10 steps")
        assert f"to {rates[-1]:g}, and never" in remark
    if "wsd" in schedule and (match := re.search(r"over the last (\d+) step", text)):
        assert int(match[1]) == falls + 1
        assert bool(remark) == (falls + 1 < round(10 * optim.decay_fraction))
    if "wsd" in schedule and not falls:
        assert remark, "no decay at all"


def test_explain_has_the_remark() -> None:
    for overrides in (["optim.warmup=50"], ["optim.schedule=wsd", "optim.decay_fraction=0"]):
        sections = {section.key: section.sentences for section in explain(tiny(*overrides), 1)}
        assert any(text.startswith(overrides[-1]) for text in sections["optimization"])
    sections = {section.key: section.sentences for section in explain(tiny(), 1)}
    assert not any(text.startswith("optim.") for text in sections["optimization"])
