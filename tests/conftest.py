"""Every test starts with accelerate's process-wide state empty: it remembers the first precision a process asked for.

And how the tests share two cores: one thread for each worker of pytest, and the directories that start processes first. A worker of
`--dist loadfile` takes a file at a time, by itself those with the fewest tests last: the longest file would begin when the others end.
"""

from collections.abc import Iterator

import pytest
import torch

PROCESSES = ("verification", "distributed", "training", "cli", "launch", "checkpoint")
"""Directories whose tests start processes, the longest files first."""

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=place_in_line)


def place_in_line(item: pytest.Item) -> int:
    directory = item.path.parent.name
    return PROCESSES.index(directory) if directory in PROCESSES else len(PROCESSES)


@pytest.fixture(autouse=True)
def _fresh_accelerate_state() -> Iterator[None]:
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
