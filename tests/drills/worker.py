"""A training job with a fault as a function for `run_ranks`: ten times faster than a launcher.

Exit codes, restarts and killed processes need a launcher: see `jobs.py`.
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
from tests.drills.driver import FaultInjector, parse
from tests.drills.jobs import DRILL, TIMEOUT_SECONDS
from tests.ranks import run_ranks as run_ranks_60s

run_ranks = partial(run_ranks_60s, timeout=TIMEOUT_SECONDS)
"""On a busy machine, 60 s is not always enough to start four ranks."""


@dataclass(frozen=True)
class RankOutcome:
    """Result of the training of one rank."""

    code: int
    text: str
    """Error message if the code is not 0."""


def train_with_fault(
    rank: int,
    world: int,
    run: Path,
    overrides: Sequence[str],
    fault: str = "",
    patch: Callable[[int], None] | None = None,
) -> RankOutcome:
    """Run `dmoe train` with the settings of the drills, as one rank.

    Args:
        rank: this rank.
        world: number of ranks.
        run: run directory.
        overrides: of the config.
        fault: as in DMOE_FAULT.
        patch: called with the rank at the start.
    """
    if patch is not None:
        patch(rank)
    faults = parse(fault, rank, restart=0)
    if faults:
        FaultInjector(faults).install()
    # run_ranks shuts the process group down
    training.shutdown = lambda: None  # type: ignore[assignment]
    try:
        training.train(load(None, [*DRILL, f"train.run_dir={run}", *overrides]), "")
    except DmoeError as error:
        return RankOutcome(error.exit_code, str(error))
    return RankOutcome(0, "")


def alerts(lines: Sequence[dict[str, object]], *words: str) -> list[str]:
    """Return the texts of the `alert` lines that contain all the words."""
    texts = [str(line["text"]) for line in lines if line["event"] == "alert"]
    return [text for text in texts if all(word in text for word in words)]


def digest_of(engine: Engine) -> str:
    """Hash all full parameters, moments, step counts and biases. Collective."""
    found = hashlib.sha256()
    for name, array in sorted(state_arrays(engine).items()):
        found.update(name.encode() + array.tobytes())
    return found.hexdigest()
