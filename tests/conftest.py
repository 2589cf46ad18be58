"""Settings of all tests: fresh accelerate state, one thread per process, long files first.

A worker of `--dist loadfile` takes one file at a time, those with the fewest tests last. The
directories that start processes have the longest files, so they come first.
"""

import os
import signal
from collections.abc import Iterator

import pytest
import torch

from dmoe.distributed import local_ranks

MULTI_PROCESS = ("verify", "drills", "distributed", "train", "cli", "launch", "checkpoint")
"""Directories whose tests start processes, the longest files first."""

torch.set_num_threads(1)
# For the workers and what they start: else a numpy.dot of 12000 numbers takes 380 us of CPU time
# for 3, since OpenBLAS's second thread waits for the first in a loop.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# The fork server of `run_ranks` imports these once; else each rank does, in half a second to two.
local_ranks.PRELOAD += ["dmoe.train.run", "dmoe.verify.verify", "transformers.modeling_utils"]
# Under nohup, or behind `&` in a script, the tests inherit that signals are ignored, and what they
# start keeps ignoring them: what waits for the end of a process would wait for ever.
for number, default in {
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
    signal.SIGQUIT: signal.SIG_DFL,
}.items():
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=directory_rank)


def directory_rank(item: pytest.Item) -> int:
    directory = item.path.parent.name
    return MULTI_PROCESS.index(directory) if directory in MULTI_PROCESS else len(MULTI_PROCESS)


@pytest.fixture(autouse=True)
def _fresh_accelerate_state() -> Iterator[None]:
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
