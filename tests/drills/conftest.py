"""The unbroken runs that the drills are compared with: each made once, by the same driver without a fault."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.drills.jobs import Outcome, same, start

__all__ = ["EPOCH", "Reference"]

EPOCH = 10
"""Steps in which the small text is read once."""
SEQUENCES, TOKENS = 8 * EPOCH, 16


@dataclass(frozen=True)
class Reference:
    """A job that ran to its end, and how it was started."""

    run: Path
    overrides: tuple[str, ...]
    ranks: int
    trace: bool = False

    def again(self, run: Path, fault: str, **how: Any) -> Outcome:
        """The same job with a fault in it."""
        return start(run, *self.overrides, ranks=self.ranks, trace=self.trace, fault=fault, **how)

    def equals(self, run: Path) -> None:
        """Assert that `run` ended with the same bits."""
        same(run, self.run)


Unbroken = Callable[..., Reference]


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """`unbroken(*overrides, ranks=4)`: that job without a fault; run at the first call with these arguments, remembered after."""
    made: dict[tuple[Any, ...], Reference] = {}

    def get(*overrides: str, ranks: int = 4, trace: bool = False) -> Reference:
        key = (overrides, ranks, trace)
        if key not in made:
            reference = Reference(
                tmp_path_factory.mktemp("unbroken") / "run", overrides, ranks, trace
            )
            outcome = reference.again(reference.run, fault="")
            assert outcome.code == 0, outcome.errors[-3000:]
            made[key] = reference
        return made[key]

    return get


@pytest.fixture(scope="session")
def two_ranks(unbroken: Unbroken, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Two ranks, two epochs and a little of ten steps each, no two sequences alike, a checkpoint after every fifth step; traced."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(
        "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=1430)), encoding="utf-8"
    )
    return unbroken(
        f"data.source={text}",
        "data.holdout=0.1",
        "train.steps=23",
        "checkpoint.every=5",
        ranks=2,
        trace=True,
    )
