"""Sampling on ranks that share the experts equals sampling on one process."""

from __future__ import annotations

import torch

from dmoe.config.schema import Config
from dmoe.distributed.init import init_distributed
from dmoe.models.generate import generate
from dmoe.train.engine import build_engine
from tests.ranks import run_ranks
from tests.tiny import VOCAB, tiny


def sample(rank: int, world: int, config: Config) -> list[int]:
    engine = build_engine(config, init_distributed("cpu"), VOCAB, torch.float64)
    return generate(engine.model, [1, 2, 3, 4, 5, 6], 12, window=16, seed=3)


def test_replicated_sequences_take_no_extra_slots() -> None:
    """With `capacity.group: global` and `eval_factor`, equal sequences once competed for slots."""
    settings = [
        "moe.capacity.group=global",
        "moe.capacity.factor=1.0",
        "moe.capacity.eval_factor=1.0",
        "model.init_std=0.3",
    ]
    alone = run_ranks(1, sample, tiny(*settings))[0]
    assert run_ranks(2, sample, tiny(*settings)) == [alone, alone]
