"""What a task is: a model, where its samples come from, and how well it does.

Letters: B samples, S positions of each that have a target.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dmoe.config.schema import Config
from dmoe.data import Data as TextData
from dmoe.data import Stream, open_data, open_tokenizer
from dmoe.models.base import Model
from dmoe.models.generate import generate
from dmoe.models.transformer import Transformer


class Samples(NamedTuple):
    """Consecutive samples of one split."""

    input: Tensor
    """[B, ...]: what the model reads."""
    target: Tensor
    """int64 [B, S]."""
    label_B: Tensor
    """int64: each sample's domain, an index into the data's `domains`."""


class Data(Protocol):
    """What a trainer knows of any data; `dmoe.data.Data` and `dmoe.data.table.Table` are such."""

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
    """Sums over some targets."""

    loss_sum: float
    targets: float
    read_bytes: float
    """Of text that the targets stand for; 0 where they are no text."""
    correct: float | None = None
    """Targets the best guess was right on; None where nobody has counted, as in training."""

    @property
    def loss(self) -> float:
        return self.loss_sum / max(1.0, self.targets)


class Task(Protocol):
    """Everything that differs between learning to write and learning to tell things apart. Made from the config alone."""

    config: Config
    name: str
    unit: str
    """What a target is called in words: token, sample."""
    targets: int
    """Of one sample: S."""
    outputs: int
    """Width V of the logits."""

    streams: tuple[str, ...]
    """Parts of a sample that may be missing; empty where none may."""

    def model(self, virtual_ranks: int = 1, recompute: bool = False) -> Model:
        """A new model with the weights of seed 0; nothing is drawn under `torch.device("meta")`."""
        ...

    def open(self) -> Any:
        """Read the data. Raises ConfigError on the field of data.* that cannot work."""
        ...

    def training(
        self, stream: Any, step: int, first: int, count: int, global_batch: int
    ) -> Samples:
        """Samples first .. first + count - 1 of the global batch of `step`: a function of these and the seed."""
        ...

    def samples(self, stream: Any, first: int, count: int) -> Samples:
        """Samples as stored, for evaluation."""
        ...

    def dummy_batch(self, count: int) -> Samples:
        """So many samples that mean nothing, of the shapes and dtypes of real ones: padding, and the warm-up."""
        ...

    def mask_stream(self, input: Tensor, stream: str) -> Tensor:
        """The same samples with one of `streams` missing."""
        ...

    def bytes_per_target(self, data: Any, target: Tensor) -> Tensor:
        """[B, S]: bytes of text each target stands for; on the target's device."""
        ...

    def measures(self, score: Score) -> Mapping[str, float]:
        """What people read beside the loss, by its name in metrics.jsonl: bits_per_byte, accuracy."""
        ...

    def sample(self, model: Model, data: Any) -> str | None:
        """Something the model has made, to be shown at the end of a run; None where there is nothing to show. Collective."""
        ...


class LanguageModelling:
    name, unit = "language_modelling", "token"
    streams: tuple[str, ...] = ()

    def __init__(self, config: Config, outputs: int | None = None) -> None:
        """`outputs`: the vocabulary, where it is known and the tokenizer need not be asked."""
        self.config, self.targets = config, config.data.seq_len
        self.outputs = open_tokenizer(config.data).vocab_size if outputs is None else outputs

    def model(self, virtual_ranks: int = 1, recompute: bool = False) -> Model:
        return Transformer(
            self.config.model,
            self.config.moe,
            self.outputs,
            virtual_ranks=virtual_ranks,
            recompute=recompute,
        )

    def open(self) -> TextData:
        return open_data(self.config.data, self.config.train.seed)

    def training(
        self, stream: Stream, step: int, first: int, count: int, global_batch: int
    ) -> Samples:
        return _shifted(
            stream.batch(step, first, count, global_batch),
            stream.labels(step, first, count, global_batch),
        )

    def samples(self, stream: Stream, first: int, count: int) -> Samples:
        return _shifted(stream.rows(first, count), stream.row_labels(first, count))

    def dummy_batch(self, count: int) -> Samples:
        token_BS = torch.zeros(count, self.targets, dtype=torch.int64)
        return Samples(token_BS, token_BS.clone(), torch.zeros(count, dtype=torch.int64))

    def mask_stream(self, input: Tensor, stream: str) -> Tensor:
        raise AssertionError("text has no streams")

    def bytes_per_target(self, data: TextData, target: Tensor) -> Tensor:
        return torch.from_numpy(data.tokenizer.token_bytes).to(target.device)[target.clamp(min=0)]

    def measures(self, score: Score) -> dict[str, float]:
        return {"bits_per_byte": bits_per_byte(score.loss_sum, score.read_bytes)}

    def sample(self, model: Model, data: TextData) -> str | None:
        """Every rank generates the same text: under expert parallelism each layer needs all of them."""
        train, tokenizer = self.config.train, data.tokenizer
        if not train.sample_tokens:
            return None
        prompt = tokenizer.encode(train.sample_prompt.encode()).tolist() or [tokenizer.separator]
        assert isinstance(model, Transformer)
        ids = generate(
            model,
            prompt,
            train.sample_tokens,
            window=self.targets,
            temperature=0.7,
            seed=train.seed,
        )
        return tokenizer.decode([*prompt, *ids])


def bits_per_byte(nats: float, read_bytes: float) -> float:
    """Bits the model needs for a byte of text, from the summed cross-entropy over it. Comparable between tokenizers."""
    return nats / math.log(2) / max(1.0, read_bytes)


def _shifted(token_BS: np.ndarray, label_B: np.ndarray) -> Samples:
    tokens = torch.from_numpy(token_BS)
    return Samples(tokens[:, :-1], tokens[:, 1:], torch.from_numpy(label_B))


def task_of(config: Config, outputs: int | None = None) -> Task:
    """The task of a config; `outputs` where its number is known already. Reads a tokenizer's file at most, no data."""
    if config.train.task == "language_modelling":
        return LanguageModelling(config, outputs)
    from dmoe.train.classification import Classification

    return Classification(config)
