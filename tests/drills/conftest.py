"""Uninterrupted runs that drills compare with: each made once, by the driver without a fault."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.drills.jobs import Outcome, assert_same_result, start

EPOCH = 10
"""Steps per epoch of the small text."""
SEQUENCES, TOKENS = 8 * EPOCH, 16


@dataclass(frozen=True)
class Reference:
    """Finished job, and the arguments that it was started with."""

    run: Path
    overrides: tuple[str, ...]
    ranks: int
    trace: bool = False

    def repeat(self, run: Path, fault: str, **how: Any) -> Outcome:
        """Run the same job with a fault."""
        return start(run, *self.overrides, ranks=self.ranks, trace=self.trace, fault=fault, **how)

    def assert_equals(self, run: Path) -> None:
        """Assert that `run` ended with the same bits."""
        assert_same_result(run, self.run)


UninterruptedRuns = Callable[..., Reference]


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> UninterruptedRuns:
    """Return a function that runs a job without a fault, once for the same arguments.

    `uninterrupted(*overrides, ranks=4)`.
    """
    made: dict[tuple[Any, ...], Reference] = {}

    def get(*overrides: str, ranks: int = 4, trace: bool = False) -> Reference:
        key = (overrides, ranks, trace)
        if key not in made:
            reference = Reference(
                tmp_path_factory.mktemp("uninterrupted") / "run", overrides, ranks, trace
            )
            outcome = reference.repeat(reference.run, fault="")
            assert outcome.code == 0, outcome.errors[-3000:]
            made[key] = reference
        return made[key]

    return get


@pytest.fixture(scope="session")
def two_ranks(
    uninterrupted: UninterruptedRuns, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    """Run two ranks for 23 steps, with a trace and a checkpoint every 5 steps.

    An epoch has ten steps, and all sequences are different.
    """
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(
        "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=1430)), encoding="utf-8"
    )
    return uninterrupted(
        f"data.source={text}",
        "data.holdout=0.1",
        "train.steps=23",
        "checkpoint.every=5",
        ranks=2,
        trace=True,
    )
