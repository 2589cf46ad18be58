"""Which sequences of the global batch this rank takes, and when.

Accumulation step a of a world of W ranks takes the samples `a*W*n .. (a+1)*W*n`, n sequences a rank, rank after rank: so W ranks with
one virtual rank each, and one rank with W virtual ones, see the same micro-batches in the same groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dmoe.data import Stream
from dmoe.models.transformer import IGNORE
from dmoe.moe.stats import Observer, nothing_more
from dmoe.training.engine import Engine

__all__ = ["Batch", "evaluation_batches", "training_batches"]


@dataclass(frozen=True)
class Batch:
    """One accumulation step of this rank."""

    token_BS: Tensor
    """int64 [B, S+1]."""
    label_B: Tensor
    """int64: each sequence's domain, for fixed routing."""
    step: int
    first_sequence: int
    """Index of the first of the B sequences in the step's global batch."""
    observer: Observer = nothing_more
    """What the layers are asked to tell of this forward, beside their counts."""


def training_batches(stream: Stream, engine: Engine, step: int) -> list[Batch]:
    """This rank's part of optimizer step `step`, one batch for each accumulation step."""
    count, world = engine.sequences, engine.world
    firsts = [(a * world.size + world.rank) * count for a in range(engine.batching.accumulation)]
    global_batch = engine.config.train.global_batch
    return [_batch(stream, step, first, count, global_batch) for first in firsts]


def _batch(stream: Stream, step: int, first: int, count: int, global_batch: int) -> Batch:
    tokens, labels = stream.batch(step, first, count, global_batch), stream.labels(step, first, count, global_batch)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), step, first)


def evaluation_batches(stream: Stream, engine: Engine) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Inputs [B, S], targets [B, S], valid [B, S], labels [B] of the first `eval_sequences` held-out sequences, shared by the ranks.

    Every rank yields equally many batches of equal shape (the experts' exchange needs all of them); what is missing at the end is
    padding: target -100, valid False.
    """
    world, count = engine.world, engine.sequences
    wanted = engine.config.train.eval_sequences
    total = wanted if stream.sequences is None else min(wanted, stream.sequences)
    for start in range(0, total, world.size * count):
        first = start + world.rank * count
        there = max(0, min(count, total - first))
        token_BS = torch.zeros(count, stream.seq_len + 1, dtype=torch.int64)
        label_B = torch.zeros(count, dtype=torch.int64)
        if there:
            token_BS[:there] = torch.from_numpy(stream.rows(first, there))
            label_B[:there] = torch.from_numpy(stream.row_labels(first, there))
        valid_BS = (torch.arange(count) < there).unsqueeze(1).expand(count, stream.seq_len)
        yield token_BS[:, :-1], token_BS[:, 1:].masked_fill(~valid_BS, IGNORE), valid_BS, label_B
