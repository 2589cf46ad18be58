"""What a task is: a model, where its samples come from, and how well it does.

Letters: B samples, S positions of each that have a target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from dmoe.config.schema import Config
from dmoe.models.base import Model


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
