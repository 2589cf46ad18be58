"""Which task a sample is taken from, where tasks differ in size.

    p_i = n_i^(1/t) / sum_j n_j^(1/t)        t = 1: in proportion to size;  t -> infinity: all alike

The temperature is that of multilingual models (Devlin 2018; Arivazhagan et al. 2019). Sample i of step s is number
n = s * global_batch + i, and its task is a function of (seed, n) alone, as the data order is: a resumed run and a run on another number
of ranks draw the same tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch

from dmoe.config.errors import ConfigError
from dmoe.moe.keyed import generator

__all__ = ["task_of", "task_weights", "tasks_of_step"]


def task_weights(sizes: Sequence[float], temperature: float = 1.0) -> list[float]:
    """The probability of each task; they sum to 1. `temperature=math.inf` gives each the same.

    Raises: ConfigError for a size that is not positive, or a temperature below or at 0.
    """
    if not sizes or not all(0 < size < math.inf for size in sizes):
        raise ConfigError("sizes", list(sizes), "must be positive numbers, at least one", "leave empty tasks out")
    if not temperature > 0:
        raise ConfigError("temperature", temperature, "must be above 0", "use 1 for proportional, 5 for a flatter choice")
    largest = max(sizes)
    raised = [(size / largest) ** (1 / temperature) for size in sizes]
    return [value / sum(raised) for value in raised]


def task_of(number: int, weights: Sequence[float], seed: int) -> int:
    """The task of sample `number` of the run."""
    uniform = float(torch.rand((), generator=generator(seed, "task", number), dtype=torch.float64))
    edges = list(accumulate(weights))
    return next((task for task, edge in enumerate(edges) if uniform * edges[-1] < edge), len(edges) - 1)


def tasks_of_step(step: int, first: int, count: int, global_batch: int, weights: Sequence[float], seed: int) -> list[int]:
    """The tasks of samples `first .. first+count-1` of a step. About 20 microseconds a sample."""
    assert 0 <= first <= first + count <= global_batch, (
        f"samples {first}..{first + count - 1} are not in a batch of {global_batch}"
    )
    return [task_of(step * global_batch + i, weights, seed) for i in range(first, first + count)]
