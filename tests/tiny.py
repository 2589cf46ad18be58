"""A model small enough to train for ten steps on four ranks of two cores, with every part of the real one."""

from dmoe.config.load import load
from dmoe.config.schema import Config

__all__ = ["VOCAB", "tiny"]

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
    return load(None, [*SMALL, *overrides])
