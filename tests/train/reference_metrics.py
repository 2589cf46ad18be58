"""A recorded step on any number of ranks, and its metrics recomputed by loops."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dmoe.config.schema import Config
from dmoe.data import open_data
from dmoe.distributed import init as worlds
from dmoe.distributed.expert_parallel import expert_parameters
from dmoe.moe.layer import MoEOutput
from dmoe.train import engine as engines
from dmoe.train.step import compute_gradients, forward, training_batches, update
from dmoe.train.telemetry import Telemetry
from dmoe.verify.decisions import record_routing

__all__ = ["Decision", "Measured", "by_layer", "measured_step"]


@dataclass
class Decision:
    """Decisions of one layer in one forward on one rank, as plain arrays."""

    rank: int
    layer: int
    expert: np.ndarray
    made: np.ndarray
    weight: np.ndarray
    score: np.ndarray
    logit: np.ndarray
    final_expert: np.ndarray
    kept: np.ndarray


@dataclass
class Measured:
    line: dict[str, Any]
    decisions: list[Decision]
    squares: dict[str, float]
    """Of each parameter's gradient, by name."""
    experts: list[str]
    bias: list[np.ndarray]
    seconds: dict[str, float]
    """Of this rank alone, by part of the step."""
    peak: float
    """Of this rank alone."""


def measured_step(rank: int, world: int, config: Config) -> Measured:
    """Record the first training step; its decisions in an extra forward without gradients."""
    here = worlds.init_distributed("cpu")
    data = open_data(config.data, config.train.seed)
    engine = engines.build_engine(config, here, data.tokenizer.vocab_size)
    telemetry, layers = Telemetry(engine, data.domains), engine.model.moe_layers()
    batches, decisions = training_batches(data.train, engine, 0), []
    for batch in batches:
        with torch.no_grad(), record_routing(layers) as (outputs, _):
            forward(engine, batch, None)
        decisions += [decision(here.rank, n, output) for n, output in enumerate(outputs)]
    # Every rank reads its data a second longer than the previous one.
    recorder = telemetry.start_recording(time.monotonic() - rank)
    totals = compute_gradients(engine, batches, recorder=recorder)
    squares = {
        name: float(p.grad.double().square().sum())
        for name, p in engine.model.named_parameters()
        if p.grad is not None
    }
    line = telemetry.train_record(
        update(engine, totals, 1e-3),
        tokens=0,
        learning_rate=1e-3,
        seconds=1.0,
        interval_tokens=engine.targets_per_step,
    )
    biases = [
        layer.router.bias_E.numpy().copy() for layer in layers if hasattr(layer.router, "bias_E")
    ]
    experts = list(expert_parameters(engine.model))
    return Measured(
        line, decisions, squares, experts, biases, recorder.timer.seconds, telemetry.peak_flops
    )


def decision(rank: int, layer: int, output: MoEOutput) -> Decision:
    before, after = output.routing, output.plan
    selected_TK, kept_TK = before.is_selected_TK, after.is_kept_TK
    tensors = (
        before.expert_TK,
        selected_TK,
        before.weight_TK,
        before.score_TE,
        before.logit_TE,
        after.expert_TK,
        kept_TK,
    )
    return Decision(rank, layer, *(tensor.detach().double().numpy().copy() for tensor in tensors))


def by_layer(decisions: list[Decision], experts: int, ep: int) -> list[dict[str, Any]]:
    """Recompute `layers` of a `train` line, one assignment at a time, from all ranks' decisions."""
    return [
        _one([d for d in decisions if d.layer == n], experts, ep)
        for n in sorted({d.layer for d in decisions})
    ]


def _one(decisions: list[Decision], experts: int, ep: int) -> dict[str, Any]:
    top_k, per_rank = decisions[0].expert.shape[1], experts // ep
    load, kept, traffic = [0] * experts, [0] * experts, [[0] * ep for _ in range(ep)]
    made_k, kept_k, weight_k, dropped_k = ([0.0] * top_k for _ in range(4))
    tokens, entropy, top1, logit_max = 0, 0.0, 0.0, 0.0
    for d in decisions:
        for t in range(len(d.expert)):
            tokens += 1
            shares = [score / d.score[t].sum() for score in d.score[t]]
            entropy -= sum(p * math.log(p) for p in shares if p > 0)
            top1 += max(shares)
            logit_max = max(logit_max, *map(abs, d.logit[t]))
            for k in range(top_k):
                if not d.made[t, k]:
                    continue
                load[int(d.expert[t, k])] += 1
                made_k[k] += 1
                weight_k[k] += d.weight[t, k]
                if d.kept[t, k]:
                    expert = int(d.final_expert[t, k])
                    kept[expert] += 1
                    kept_k[k] += 1
                    traffic[d.rank % ep][expert // per_rank] += 1
                else:
                    dropped_k[k] += d.weight[t, k]
    mean = sum(load) / experts
    return {
        "load": load,
        "kept": kept,
        "load_by_rank": [sum(load[r * per_rank : (r + 1) * per_rank]) for r in range(ep)],
        "load_cv": math.sqrt(sum((count - mean) ** 2 for count in load) / experts) / mean,
        "load_max_over_mean": max(load) / mean,
        "max_vio": (max(load) - mean) / mean,
        "rank_max_over_mean": max(
            sum(kept[r * per_rank : (r + 1) * per_rank]) * ep / sum(kept) for r in range(ep)
        ),
        "dead_experts": sum(count == 0 for count in load),
        "drop_rate": 1 - sum(kept) / sum(load),
        "drop_rate_by_choice": [
            1 - b / a if a else 0.0 for a, b in zip(made_k, kept_k, strict=True)
        ],
        "dropped_mass_by_choice": [
            b / a if a else 0.0 for a, b in zip(weight_k, dropped_k, strict=True)
        ],
        "dropped_mass": sum(dropped_k) / sum(weight_k),
        "router_entropy": entropy / tokens,
        "top1_probability": top1 / tokens,
        "logit_max": logit_max,
        "effective_k": sum(kept) / tokens,
        "traffic": traffic,
    }
