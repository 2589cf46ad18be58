"""A short training run on each rank, for tests that compare world sizes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from dmoe.config.schedule import learning_rate
from dmoe.config.schema import Config
from dmoe.data import open_data
from dmoe.distributed.init import init_distributed
from dmoe.distributed.state_dict import model_state
from dmoe.train.engine import build_engine
from dmoe.train.step import train_step, training_batches

__all__ = ["Trace", "trace"]


@dataclass
class Trace:
    losses: list[float]
    norms: list[float]
    clips: list[float]
    aux: list[dict[str, float]]
    choices: list[list[int]]
    kept: list[list[int]]
    weights: dict[str, np.ndarray]


def trace(
    rank: int, world: int, config: Config, steps: int, dtype: torch.dtype = torch.float32
) -> Trace:
    """Train `steps` steps and record losses, norms, counts and the full weights."""
    process = init_distributed("cpu")
    data = open_data(config.data, config.train.seed)
    engine = build_engine(config, process, data.tokenizer.vocab_size, dtype)
    seen = Trace([], [], [], [], [], [], {})
    for step in range(steps):
        rate = learning_rate(step, config.train.steps, config.optim)
        result = train_step(engine, training_batches(data.train, engine, step), rate)
        seen.losses.append(result.totals.loss_sum)
        seen.norms.append(result.grad_norm)
        seen.clips.append(result.clip_factor)
        for layer in result.totals.layers:
            seen.aux.append(layer.aux)
            seen.choices.append(layer.choice_counts)
            seen.kept.append(layer.kept_counts)
    for name, value in model_state(engine.model, engine.mesh).items():
        seen.weights[name] = (value.full_tensor() if isinstance(value, DTensor) else value).numpy()
    return seen
