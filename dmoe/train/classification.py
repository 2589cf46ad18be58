"""A sample belongs to one of a few classes. Its domain is its class, so an evaluation tells each class apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmoe.config.schema import Config
from dmoe.data.tables import SampleStream, Table, classes_of, open_table, widths_of
from dmoe.models.base import Model
from dmoe.models.classifier import Classifier
from dmoe.train.tasks import Samples, Score


class Classification:
    name, unit, targets = "classification", "sample", 1

    def __init__(self, config: Config) -> None:
        self.config, self.outputs, self.widths = (
            config,
            classes_of(config.data),
            widths_of(config.data),
        )
        self.streams = tuple(self.widths) if len(self.widths) > 1 else ()

    def model(self, virtual_ranks: int = 1, recompute: bool = False) -> Model:
        model, moe = self.config.model, self.config.moe
        return Classifier(
            model,
            moe,
            list(self.widths.values()),
            self.outputs,
            virtual_ranks=virtual_ranks,
            recompute=recompute,
        )

    def open(self) -> Table:
        return open_table(self.config.data, self.config.train.seed)

    def training(
        self, stream: SampleStream, step: int, first: int, count: int, global_batch: int
    ) -> Samples:
        return _samples(*stream.batch(step, first, count, global_batch))

    def samples(self, stream: SampleStream, first: int, count: int) -> Samples:
        return _samples(*stream.rows(first, count))

    def dummy_batch(self, count: int) -> Samples:
        return Samples(
            torch.zeros(count, sum(self.widths.values())),
            torch.zeros(count, 1, dtype=torch.int64),
            torch.zeros(count, dtype=torch.int64),
        )

    def mask_stream(self, input: Tensor, stream: str) -> Tensor:
        """The same samples with a stream that is missing: NaN in its columns."""
        names = list(self.widths)
        first = sum(self.widths[name] for name in names[: names.index(stream)])
        changed = input.clone()
        changed[:, first : first + self.widths[stream]] = math.nan
        return changed

    def bytes_per_target(self, data: Table, target: Tensor) -> Tensor:
        return torch.zeros_like(target)

    def measures(self, score: Score) -> dict[str, float]:
        return (
            {} if score.correct is None else {"accuracy": score.correct / max(1.0, score.targets)}
        )

    def sample(self, model: Model, data: Table) -> str | None:
        return None


def _samples(*found: object) -> Samples:
    x_BW, class_B = (torch.from_numpy(part) for part in found)
    return Samples(x_BW, class_B.unsqueeze(1), class_B)
