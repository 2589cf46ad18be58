"""Drills 24 and 25: no sample is repeated or skipped, and random numbers continue.

An epoch of the text has ten steps and all its sequences are different, so the samples of the ranks
can be compared with the text. Of a step that two attempts did, the later one counts.
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
"""Fault, and the step that each restart resumes from (checkpoints after steps 5, 10, ...)."""


@pytest.fixture(scope="module", params=KILLS.values(), ids=KILLS.keys())
def resumed(
    request: pytest.FixtureRequest, two_ranks: Reference, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Run a job that is killed and resumed to its end."""
    fault, expected = request.param
    run = tmp_path_factory.mktemp("resumed") / "run"
    outcome = two_ranks.repeat(run, fault, restarts=len(expected))
    assert outcome.code == 0, outcome.errors[-3000:]
    assert [line["resumed_from"] for line in events(run, "restart")] == expected
    return run


def effective(run: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """Return the trace line of the last attempt by (step, rank)."""
    return {(line["step"], line["rank"]): line for line in trace(run)}


def stored(reference: Reference) -> list[str]:
    """Return the hashes of all training sequences of the text."""
    given = dict(override.split("=", 1) for override in reference.overrides)
    config = DataConfig(
        source=given["data.source"], holdout=float(given["data.holdout"]), seq_len=16
    )
    data = open_data(config, seed=0)
    assert data.train.num_sequences is not None
    return [digest(row) for row in data.train.samples(0, data.train.num_sequences)]


def test_no_sample_is_repeated_or_skipped(resumed: Path, two_ranks: Reference) -> None:
    """Each of two epochs has every sequence once, in the order of the uninterrupted run."""
    sequences, lines = stored(two_ranks), effective(resumed)
    assert len(sequences) == len(set(sequences)) == 8 * EPOCH
    for epoch in range(2):
        steps = range(epoch * EPOCH + 1, (epoch + 1) * EPOCH + 1)
        read = Counter(
            sample for step in steps for rank in range(2) for sample in lines[step, rank]["samples"]
        )
        assert read == Counter(sequences)
    expected = effective(two_ranks.run)
    assert {key: line["samples"] for key, line in lines.items()} == {
        key: line["samples"] for key, line in expected.items()
    }


def test_random_numbers_of_every_rank_continue(resumed: Path, two_ranks: Reference) -> None:
    """The ranks draw different amounts of numbers, so each needs its own generator state."""
    lines, expected = effective(resumed), effective(two_ranks.run)
    assert all(
        expected[step, 0]["draws"] != expected[step, 1]["draws"][:1] for step in range(2, 24)
    )
    assert {key: line["draws"] for key, line in lines.items()} == {
        key: line["draws"] for key, line in expected.items()
    }


def test_the_result_is_equal_bit_for_bit(resumed: Path, two_ranks: Reference) -> None:
    two_ranks.assert_equals(resumed)
