"""A training job as a function of a rank, for `run_ranks`: the real trainer with a fault in it, a tenth of the price of a launcher.

What only a launcher shows (exit codes, restarts, processes that die) is for `jobs.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dmoe.config.errors import DmoeError
from dmoe.config.load import load
from dmoe.train import run as training
from dmoe.train.engine import Engine
from dmoe.verify.capture import state_arrays
from tests.drills.driver import Faults, parse
from tests.drills.jobs import DRILL, PATIENCE
from tests.ranks import run_ranks as run_ranks_in_a_minute

__all__ = ["Ending", "alerts", "digest_of", "run_ranks", "train_inside"]

run_ranks = partial(run_ranks_in_a_minute, timeout=PATIENCE)
"""For a machine that others use too: a minute is not always enough to start four ranks there."""


@dataclass(frozen=True)
class Ending:
    """How a rank's training ended."""

    code: int
    text: str
    """What the user is told where the code is not 0."""


def train_inside(
    rank: int,
    world: int,
    run: Path,
    overrides: Sequence[str],
    fault: str = "",
    patch: Callable[[int], None] | None = None,
) -> Ending:
    """`dmoe train` with the drills' settings, as one rank. fault: as in DMOE_FAULT. patch: called with the rank before anything."""
    if patch is not None:
        patch(rank)
    faults = parse(fault, rank, restart=0)
    if faults:
        Faults(faults).install()
    training.shutdown = lambda: None  # type: ignore[assignment]  # the group is run_ranks's
    try:
        training.train(load(None, [*DRILL, f"train.run_dir={run}", *overrides]), "")
    except DmoeError as error:
        return Ending(error.exit_code, str(error))
    return Ending(0, "")


def alerts(lines: Sequence[dict[str, object]], *words: str) -> list[str]:
    """The texts of those `alert` lines that hold all the words."""
    texts = [str(line["text"]) for line in lines if line["event"] == "alert"]
    return [text for text in texts if all(word in text for word in words)]


def digest_of(engine: Engine) -> str:
    """SHA-256 of every parameter, moment, step count and bias, whole, of all ranks. Collective."""
    found = hashlib.sha256()
    for name, array in sorted(state_arrays(engine).items()):
        found.update(name.encode() + array.tobytes())
    return found.hexdigest()
