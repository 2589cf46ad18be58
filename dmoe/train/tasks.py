"""Tasks: the model, the data and the metrics of a kind of training (`train.task`).

Letters: B samples, S positions with a target per sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dmoe.config.router_kinds import router_spec
from dmoe.config.schema import Config
from dmoe.data import DatasetSplits, TokenDataset, open_data, open_tokenizer
from dmoe.data.tables import SampleDataset, TableSplits, num_classes, open_table, stream_widths
from dmoe.models.base import Model
from dmoe.models.classifier import Classifier
from dmoe.models.generate import generate
from dmoe.models.samples import Samples, collate_tokens, read_masks, target_bytes
from dmoe.models.transformer import Transformer


class DataSplits(Protocol):
    """Training and held-out split: `dmoe.data.DatasetSplits` or `dmoe.data.tables.TableSplits`."""

    @property
    def train(self) -> Any: ...
    @property
    def held_out(self) -> Any: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def domains(self) -> tuple[str, ...]: ...
    def describe(self) -> str: ...


@dataclass(frozen=True)
class Score:
    """Sums over a number of targets."""

    loss_sum: float
    """Cross-entropy in nats."""
    targets: float
    target_bytes: float
    """Bytes of text of the targets; 0 if they are not text."""
    correct: float | None = None
    """Targets with the largest logit; None where that is not counted, as in training."""

    @property
    def loss(self) -> float:
        return self.loss_sum / max(1.0, self.targets)


class Task(Protocol):
    """Everything that differs between language modelling and classification."""

    config: Config
    name: str
    """Value of `train.task`."""
    unit: str
    """Word for a target: token or sample."""
    targets_per_sample: int
    """S."""
    predicts_all_targets: bool
    """Whether no target is ever IGNORE_INDEX in training."""
    num_outputs: int
    """Width V of the logits: vocabulary size or number of classes."""
    streams: tuple[str, ...]
    """Parts of a sample that may be missing; empty if none may."""

    def build_model(self, virtual_ranks: int = 1, recompute: str = "none") -> Model:
        """Build the model with the weights of seed 0, or without under `torch.device("meta")`."""
        ...

    def open_data(self) -> Any:
        """Read the data. Raises ConfigError on the field of `data` that cannot work."""
        ...

    def training_samples(
        self, dataset: Any, step: int, first: int, count: int, global_batch: int
    ) -> Samples:
        """Return samples first .. first + count - 1 of the global batch of a step.

        Args:
            dataset: the training split.
            step: number of the optimizer step.
            first: index of the first sample in the global batch.
            count: number of samples.
            global_batch: samples per step. The result is a function of these and the seed.
        """
        ...

    def samples(self, dataset: Any, first: int, count: int) -> Samples:
        """Return samples first .. first + count - 1 of a split as stored, for evaluation."""
        ...

    def dummy_batch(self, count: int, random: torch.Generator | None = None) -> Samples:
        """Return `count` samples of the real shapes and dtypes.

        All zero, for padding; with `random` drawn evenly from all inputs, for the warm-up.
        """
        ...

    def mask_stream(self, input: Tensor, stream: str) -> Tensor:
        """Return the samples with one of `streams` missing."""
        ...

    def bytes_per_target(self, data: Any, target: Tensor) -> Tensor:
        """Return [B, S]: bytes of text of each target, on the target's device."""
        ...

    def metrics(self, score: Score) -> Mapping[str, float]:
        """Return the metrics by their names in metrics.jsonl: bits_per_byte or accuracy."""
        ...

    def generate_sample(self, model: Model, data: Any) -> str | None:
        """Return a generated text to show at the end of a run, or None. Collective."""
        ...


class LanguageModelling:
    """Predict each token from the tokens before it."""

    name, unit = "language_modelling", "token"
    streams: tuple[str, ...] = ()

    def __init__(self, config: Config, num_outputs: int | None = None) -> None:
        """`num_outputs`: the vocabulary size, if known; else the tokenizer's file is read."""
        self.config, self.targets_per_sample = config, config.data.seq_len
        self.predicts_all_targets = config.data.format == "text"
        self.num_outputs = (
            open_tokenizer(config.data).vocab_size if num_outputs is None else num_outputs
        )

    def build_model(self, virtual_ranks: int = 1, recompute: str = "none") -> Model:
        if self.config.model.source is not None:
            from dmoe.hf.model import PublishedModel

            return PublishedModel(self.config, self.num_outputs, virtual_ranks, recompute)
        return Transformer(
            self.config.model,
            self.config.moe,
            self.num_outputs,
            virtual_ranks=virtual_ranks,
            recompute=recompute,
        )

    def open_data(self) -> DatasetSplits:
        return open_data(self.config.data, self.config.train.seed)

    def training_samples(
        self, dataset: TokenDataset, step: int, first: int, count: int, global_batch: int
    ) -> Samples:
        return collate_tokens(
            dataset.batch(step, first, count, global_batch),
            dataset.labels(step, first, count, global_batch),
            read_masks(dataset, "masks", step, first, count, global_batch),
        )

    def samples(self, dataset: TokenDataset, first: int, count: int) -> Samples:
        masks = read_masks(dataset, "sample_masks", first, count)
        return collate_tokens(
            dataset.samples(first, count), dataset.sample_labels(first, count), masks
        )

    def dummy_batch(self, count: int, random: torch.Generator | None = None) -> Samples:
        token_BS = torch.zeros(count, self.targets_per_sample, dtype=torch.int64)
        label_B = torch.zeros(count, dtype=torch.int64)
        if random is not None:
            token_BS.random_(self.num_outputs, generator=random)
            label_B.random_(count_routing_labels(self.config), generator=random)
        # the layers are to know in every step whether there is padding
        has_padding = not self.predicts_all_targets
        valid_BS = torch.ones_like(token_BS, dtype=torch.bool) if has_padding else None
        return Samples(token_BS, token_BS.clone(), label_B, None, valid_BS)

    def mask_stream(self, input: Tensor, stream: str) -> Tensor:
        raise AssertionError("text has no streams")

    def bytes_per_target(self, data: DatasetSplits, target: Tensor) -> Tensor:
        return target_bytes(torch.from_numpy(data.tokenizer.token_bytes).to(target.device), target)

    def metrics(self, score: Score) -> dict[str, float]:
        return {"bits_per_byte": bits_per_byte(score.loss_sum, score.target_bytes)}

    def generate_sample(self, model: Model, data: DatasetSplits) -> str | None:
        """Generate the same text on all ranks: under expert parallelism each layer needs them."""
        train, tokenizer = self.config.train, data.tokenizer
        own = not isinstance(model, Transformer) and self.config.model.source is None
        if own or not train.sample_tokens:
            return None
        prompt = tokenizer.encode(train.sample_prompt.encode()).tolist() or [tokenizer.separator]
        if data.chat is not None:
            from dmoe.data.instruct import prompt_ids

            asked = [{"role": "user", "content": train.sample_prompt}]
            prompt = prompt_ids(asked, data.chat, tokenizer)
        network: Any = model  # a published one takes the same calls, without a cache
        ids = generate(
            network,
            prompt,
            train.sample_tokens,
            window=self.targets_per_sample,
            temperature=0.7,
            seed=train.seed,
        )
        return tokenizer.decode([*prompt, *ids])


class Classification:
    """Predict the class of a sample of numbers, which is its domain in evaluations too."""

    name, unit, targets_per_sample = "classification", "sample", 1
    predicts_all_targets = True

    def __init__(self, config: Config) -> None:
        self.config, self.num_outputs = config, num_classes(config.data)
        self.widths = stream_widths(config.data)
        self.streams = tuple(self.widths) if len(self.widths) > 1 else ()

    def build_model(self, virtual_ranks: int = 1, recompute: str = "none") -> Model:
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
        return _collate_rows(*dataset.batch(step, first, count, global_batch))

    def samples(self, dataset: SampleDataset, first: int, count: int) -> Samples:
        return _collate_rows(*dataset.samples(first, count))

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


def count_routing_labels(config: Config) -> int:
    """Count the labels that send samples to different experts; 1 if routing ignores labels."""
    if router_spec(config.moe.router.kind).needs != "label_T" or config.modular.bank != "none":
        return 1
    return max(1, config.moe.num_experts // config.moe.top_k)


def bits_per_byte(loss_sum: float, target_bytes: float) -> float:
    """Return bits per byte of text from the summed cross-entropy: comparable between tokenizers."""
    return loss_sum / math.log(2) / max(1.0, target_bytes)


def _collate_rows(*found: object) -> Samples:
    x_BW, class_B = (torch.from_numpy(part) for part in found)
    return Samples(x_BW, class_B.unsqueeze(1), class_B)


def task_of(config: Config, num_outputs: int | None = None) -> Task:
    """Return the task of a config. Reads a tokenizer's file at most, no data.

    `num_outputs`: the vocabulary size, if it is known.
    """
    if config.train.task == "language_modelling":
        return LanguageModelling(config, num_outputs)
    return Classification(config)
