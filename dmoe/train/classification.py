"""Classification: each sample has one class, which is its domain in evaluations too."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmoe.config.schema import Config
from dmoe.data.tables import SampleDataset, TableSplits, num_classes, open_table, stream_widths
from dmoe.models.base import Model
from dmoe.models.classifier import Classifier
from dmoe.train.tasks import Samples, Score


class Classification:
    """Predict the class of a sample of numbers."""

    name, unit, targets_per_sample = "classification", "sample", 1

    def __init__(self, config: Config) -> None:
        self.config, self.num_outputs, self.widths = (
            config,
            num_classes(config.data),
            stream_widths(config.data),
        )
        self.streams = tuple(self.widths) if len(self.widths) > 1 else ()

    def build_model(self, virtual_ranks: int = 1, recompute: bool = False) -> Model:
        model, moe = self.config.model, self.config.moe
        return Classifier(
            model,
            moe,
            list(self.widths.values()),
            self.num_outputs,
            virtual_ranks=virtual_ranks,
            recompute=recompute,
        )

    def open_data(self) -> TableSplits:
        return open_table(self.config.data, self.config.train.seed)

    def training_samples(
        self, dataset: SampleDataset, step: int, first: int, count: int, global_batch: int
    ) -> Samples:
        return _samples(*dataset.batch(step, first, count, global_batch))

    def samples(self, dataset: SampleDataset, first: int, count: int) -> Samples:
        return _samples(*dataset.samples(first, count))

    def dummy_batch(self, count: int, random: torch.Generator | None = None) -> Samples:
        x_BW = torch.zeros(count, sum(self.widths.values()))
        class_B = torch.zeros(count, dtype=torch.int64)
        if random is not None:
            x_BW.normal_(generator=random)
            class_B.random_(self.num_outputs, generator=random)
        return Samples(x_BW, class_B.unsqueeze(1), class_B)

    def mask_stream(self, input: Tensor, stream: str) -> Tensor:
        """Return the samples with NaN in the columns of one stream."""
        names = list(self.widths)
        first = sum(self.widths[name] for name in names[: names.index(stream)])
        changed = input.clone()
        changed[:, first : first + self.widths[stream]] = math.nan
        return changed

    def bytes_per_target(self, data: TableSplits, target: Tensor) -> Tensor:
        return torch.zeros_like(target)

    def metrics(self, score: Score) -> dict[str, float]:
        return (
            {} if score.correct is None else {"accuracy": score.correct / max(1.0, score.targets)}
        )

    def generate_sample(self, model: Model, data: TableSplits) -> str | None:
        return None


def _samples(*found: object) -> Samples:
    x_BW, class_B = (torch.from_numpy(part) for part in found)
    return Samples(x_BW, class_B.unsqueeze(1), class_B)
