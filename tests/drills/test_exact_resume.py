"""Drills 24 and 25: no sample twice, none skipped, and each rank's random numbers go on where they were.

The text is read once in ten steps and no two of its sequences are alike, so what the ranks read can be held against what is stored.
A step that was done by two attempts counts as the later one did it: the earlier one's update died with its process.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dmoe.config.schema import DataConfig
from dmoe.data import open_data
from tests.drills.conftest import EPOCH, Reference
from tests.drills.driver import digest
from tests.drills.jobs import events, trace

pytestmark = pytest.mark.drills

KILLS = {
    "in the middle of the epoch": ("kill@step rank=1 step=7", [5]),
    "at its last batch": ("kill@step rank=0 step=10", [5]),
    "at its end": ("kill@step rank=1 step=11", [10]),
    "twice in a row": (
        "kill@step rank=1 step=9 restarts=0; kill@step rank=0 step=7 restarts=1",
        [5, 5],
    ),
}
"""Where the fault strikes, and the step each restart goes on from (checkpoints after steps 5, 10, ...)."""


@pytest.fixture(scope="module", params=KILLS.values(), ids=KILLS.keys())
def resumed(
    request: pytest.FixtureRequest, two_ranks: Reference, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that was killed and went on to its end."""
    fault, expected = request.param
    run = tmp_path_factory.mktemp("resumed") / "run"
    outcome = two_ranks.again(run, fault, restarts=len(expected))
    assert outcome.code == 0, outcome.errors[-3000:]
    assert [line["resumed_from"] for line in events(run, "restart")] == expected
    return run


def effective(run: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """By (step, rank), what the last attempt that did the step read and drew there."""
    return {(line["step"], line["rank"]): line for line in trace(run)}


def stored(reference: Reference) -> list[str]:
    """Every training sequence of the text, as `digest` tells it."""
    given = dict(override.split("=", 1) for override in reference.overrides)
    config = DataConfig(
        source=given["data.source"], holdout=float(given["data.holdout"]), seq_len=16
    )
    data = open_data(config, seed=0)
    assert data.train.num_sequences is not None
    return [digest(row) for row in data.train.samples(0, data.train.num_sequences)]


def test_no_sample_twice_and_none_skipped(resumed: Path, two_ranks: Reference) -> None:
    """Each of the first two epochs holds every stored sequence once; the order is that of the unbroken run."""
    there, seen = stored(two_ranks), effective(resumed)
    assert len(there) == len(set(there)) == 8 * EPOCH
    for epoch in range(2):
        steps = range(epoch * EPOCH + 1, (epoch + 1) * EPOCH + 1)
        read = Counter(
            sample for step in steps for rank in range(2) for sample in seen[step, rank]["samples"]
        )
        assert read == Counter(there)
    whole = effective(two_ranks.run)
    assert {key: line["samples"] for key, line in seen.items()} == {
        key: line["samples"] for key, line in whole.items()
    }


def test_every_ranks_random_numbers_go_on(resumed: Path, two_ranks: Reference) -> None:
    """Drawn from torch's default generator, which the ranks have advanced unequally: one rank's state would not do for the other."""
    seen, whole = effective(resumed), effective(two_ranks.run)
    assert all(whole[step, 0]["draws"] != whole[step, 1]["draws"][:1] for step in range(2, 24))
    assert {key: line["draws"] for key, line in seen.items()} == {
        key: line["draws"] for key, line in whole.items()
    }


def test_and_not_one_bit_of_the_result_differs(resumed: Path, two_ranks: Reference) -> None:
    two_ranks.equals(resumed)
