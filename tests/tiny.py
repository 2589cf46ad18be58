"""Smallest config for tests: ten steps on four ranks, with every part of a real model."""

from dmoe.config.load import load
from dmoe.config.schema import Config

VOCAB = 256

SMALL = (
    "model.dim=32",
    "model.layers=2",
    "model.heads=2",
    "moe.num_experts=8",
    "moe.expert_dim=24",
    "data.seq_len=16",
    "data.source=synthetic:zipf",
    "train.steps=10",
    "train.global_batch=8",
    "train.eval_sequences=8",
    "train.precision=fp32",
    "train.device=cpu",
    "optim.warmup=2",
)


def tiny(*overrides: str) -> Config:
    """Return the config of a tiny model with overrides."""
    return load(None, [*SMALL, *overrides])
