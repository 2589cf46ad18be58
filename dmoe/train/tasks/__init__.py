"""What can be learned, one task a file: `train.task`."""

from __future__ import annotations

from dmoe.config.schema import Config
from dmoe.train.tasks.base import Data, Samples, Score, Task
from dmoe.train.tasks.language_modelling import LanguageModelling

__all__ = ["Data", "Samples", "Score", "Task", "task_of"]


def task_of(config: Config, outputs: int | None = None) -> Task:
    """The task of a config; `outputs` where its number is known already. Reads a tokenizer's file at most, no data."""
    if config.train.task == "language_modelling":
        return LanguageModelling(config, outputs)
    from dmoe.train.tasks.classification import Classification

    return Classification(config)
