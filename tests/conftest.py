"""Settings of all tests: fresh accelerate state, one torch thread per worker, long files first.

A worker of `--dist loadfile` takes one file at a time, those with the fewest tests last. The
directories that start processes have the longest files, so they come first.
"""

import signal
from collections.abc import Iterator

import pytest
import torch

MULTI_PROCESS = ("verify", "distributed", "train", "cli", "launch", "checkpoint")
"""Directories whose tests start processes, the longest files first."""

torch.set_num_threads(1)
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
