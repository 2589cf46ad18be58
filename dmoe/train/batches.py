"""Which samples of the global batch this rank takes, and when.

Accumulation step a of a world of W ranks takes the samples `a*W*n .. (a+1)*W*n`, n sequences a rank, rank after rank: so W ranks with
one virtual rank each, and one rank with W virtual ones, see the same micro-batches in the same groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmoe.models.base import IGNORE
from dmoe.moe.metrics import MetricsFn, nothing_more
from dmoe.train.engine import Engine


@dataclass(frozen=True)
class Batch:
    """One accumulation step of this rank."""

    input: Tensor
    """[B, ...]: for a language model token ids."""
    target: Tensor
    """int64 [B, S]."""
    label_B: Tensor
    """int64: each sample's domain, for fixed routing."""
    step: int
    first_sequence: int
    """Index of the first of the B samples in the step's global batch."""
    observer: MetricsFn = nothing_more
    """What the layers are asked to tell of this forward, beside their counts."""


@dataclass(frozen=True)
class EvalBatch:
    """One batch of an evaluation, on this rank."""

    input: Tensor
    target: Tensor
    """int64 [B, S]; -100 for padding."""
    valid_BS: Tensor
    label_B: Tensor


def training_batches(stream: Any, engine: Engine, step: int) -> list[Batch]:
    """This rank's part of optimizer step `step`, one batch for each accumulation step."""
    count, world = engine.sequences, engine.process
    firsts = [(a * world.size + world.rank) * count for a in range(engine.batching.accumulation)]
    global_batch = engine.config.train.global_batch
    return [
        Batch(*engine.task.training(stream, step, first, count, global_batch), step, first)
        for first in firsts
    ]


def evaluation_batches(stream: Any, engine: Engine) -> Iterator[EvalBatch]:
    """The first `eval_sequences` held-out samples, shared by the ranks.

    Every rank yields equally many batches of equal shape (the experts' exchange needs all of them); what is missing at the end is
    padding: target -100, valid False.
    """
    world, count = engine.process, engine.sequences
    wanted = engine.config.train.eval_sequences
    total = wanted if stream.sequences is None else min(wanted, stream.sequences)
    for start in range(0, total, world.size * count):
        first = start + world.rank * count
        there = max(0, min(count, total - first))
        input, target, label_B = engine.task.dummy_batch(count)
        if there:
            found = engine.task.samples(stream, first, there)
            for whole, part in zip((input, target, label_B), found, strict=True):
                whole[:there] = part
        valid_BS = (torch.arange(count) < there).unsqueeze(1).expand_as(target)
        yield EvalBatch(input, target.masked_fill(~valid_BS, IGNORE), valid_BS, label_B)
