"""Each token predicts the next one."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dmoe.config.schema import Config
from dmoe.data import Data, Stream, open_data, open_tokenizer
from dmoe.models.base import Model
from dmoe.models.generate import generate
from dmoe.models.transformer import Transformer
from dmoe.train.tasks.base import Samples, Score


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

    def open(self) -> Data:
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

    def bytes_per_target(self, data: Data, target: Tensor) -> Tensor:
        return torch.from_numpy(data.tokenizer.token_bytes).to(target.device)[target.clamp(min=0)]

    def measures(self, score: Score) -> dict[str, float]:
        return {"bits_per_byte": bits_per_byte(score.loss_sum, score.read_bytes)}

    def sample(self, model: Model, data: Data) -> str | None:
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
