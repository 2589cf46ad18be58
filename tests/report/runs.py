"""Run directories for tests: a real config, and metrics lines with all keys of the trainer."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmoe.config.load import to_yaml
from tests.tiny import tiny

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><b>&amp; ' % {x} \u2028 \ud800"
Line = dict[str, Any]


def line(event: str, step: int, **values: Any) -> Line:
    return {"event": event, "step": step, "time": 1_790_000_000 + step, **values}


def write(path: Path, lines: Sequence[Line], *overrides: str, torn: str = "") -> Path:
    """Write a run directory with these metrics lines, and `torn` after them."""
    path.mkdir(parents=True)
    (path / "resolved.yaml").write_text(to_yaml(tiny(*overrides)), encoding="utf-8")
    text = "".join(json.dumps(item) + "\n" for item in lines)
    (path / "metrics.jsonl").write_text(text + torn, encoding="utf-8")
    return path


def write_run(
    path: Path,
    steps: int = 60,
    *,
    every: int = 2,
    layers: int = 2,
    experts: int = 8,
    ranks: int = 2,
    seed: int = 0,
) -> Path:
    """Write a run with all events: skip, restart, alerts, checkpoints, evaluations, samples."""
    draw = random.Random(seed)
    half = steps // 2 // every * every
    size = {"layers": layers, "experts": experts, "ranks": ranks}
    lines = [
        line(
            "start",
            0,
            parameters=53_984,
            active_parameters=26_336,
            world=ranks,
            ep=ranks,
            precision="fp32",
            data="4641d4",
        )
    ]
    for step in range(every, steps + 1, every):
        lines.append(train_line(draw, step, steps, **size))
        if step % max(every, steps // 6 // every * every) == 0:
            lines.append(eval_line(draw, step, steps, layers, experts))
        if step == half:
            lines += [
                line("checkpoint", step, seconds=0.21),
                line(
                    "alert",
                    step,
                    title="dead experts",
                    text=f"expert 3 of layer 0 is dead {HOSTILE}",
                ),
            ]
            lines += [
                train_line(draw, step + every, steps, **size),
                line("restart", step, resumed_from=step, world=ranks, ep=ranks),
            ]
            lines.append(
                line(
                    "alert",
                    step + 1,
                    text=f"step {step + 1} skipped on all ranks: loss or gradient not finite",
                )
            )
    lines += [
        line("checkpoint", steps, seconds=0.4),
        line("end", steps, bits_per_byte=2.5, sample=f"def f(x):\n    return {HOSTILE}"),
    ]
    return write(
        path,
        lines,
        "moe.capacity.factor=1.25",
        f"moe.num_experts={experts}",
        f"train.steps={steps}",
    )


def train_line(
    draw: random.Random, step: int, steps: int, *, layers: int, experts: int, ranks: int
) -> Line:
    loss = 2.2 + 3.4 * math.exp(-4 * step / steps) + draw.gauss(0, 0.03)
    rows = [train_layer(draw, index, step / steps, experts, ranks) for index in range(layers)]
    parts = {
        "data": 0.002,
        "forward": 0.031,
        "backward": 0.058,
        "exchange": 0.017,
        "optimizer": 0.006,
        "other": 0.003,
    }
    return line(
        "train",
        step,
        loss=loss,
        bits_per_byte=loss / math.log(2),
        aux={"switch": 1.02, "z": 4.1},
        aux_weighted={"switch": 0.0102, "z": 0.0041},
        grad_norm=draw.uniform(0.6, 1.6),
        grad_norm_dense=draw.uniform(0.4, 1.0),
        grad_norm_experts=draw.uniform(0.3, 0.9),
        grad_norm_router=draw.uniform(0.01, 0.1),
        clip_factor=draw.uniform(0.6, 1.0),
        updated=True,
        lr=0.004 * (1 - step / (steps + 1)),
        tokens=step * 3072,
        tokens_per_second=draw.uniform(21_000, 25_000),
        drop_rate=sum(row["drop_rate"] for row in rows) / layers,
        load_max_over_mean=max(row["load_max_over_mean"] for row in rows),
        step_time={name: value * draw.uniform(0.9, 1.2) for name, value in parts.items()},
        bytes_exchanged=draw.randint(900_000, 1_100_000),
        straggler=draw.uniform(1.0, 1.2),
        memory=draw.randint(10**9, 11 * 10**8),
        mfu=draw.uniform(0.3, 0.4),
        layers=rows,
    )


def train_layer(draw: random.Random, index: int, progress: float, experts: int, ranks: int) -> Line:
    favour = [
        1 + (2.5 * (1 - progress) if (expert * 5 + index) % experts < 2 else 0)
        for expert in range(experts)
    ]
    load = [round(3072 * 2 / experts * weight * draw.uniform(0.7, 1.3)) for weight in favour]
    mean = sum(load) / experts
    kept = [min(count, round(1.25 * mean)) for count in load]
    share = experts // ranks
    drop = 1 - sum(kept) / sum(load)
    return {
        **old_layer(index, load, drop),
        "aux_weighted": {"switch": 0.0102, "z": 0.0041},
        "kept": kept,
        "load_cv": math.sqrt(sum((count - mean) ** 2 for count in load) / experts) / mean,
        "load_by_rank": [sum(load[rank * share : (rank + 1) * share]) for rank in range(ranks)],
        "dead_experts": sum(count == 0 for count in load),
        "drop_rate_by_choice": [drop * 0.6, drop * 1.4],
        "dropped_mass_by_choice": [drop * 0.5, drop * 0.3],
        "router_entropy": 2.0 - 0.8 * progress + 0.1 * index,
        "logit_max": 2 + 4 * progress,
        "top1_probability": 0.2 + 0.4 * progress,
        "effective_k": 2.0,
        "bias_min": -0.02 * progress,
        "bias_max": 0.03 * progress,
        "bias_drift": 0.001,
        "traffic": [
            [draw.randint(600, 900) + (700 if i == j else 0) for j in range(ranks)]
            for i in range(ranks)
        ],
    }


def old_layer(index: int, load: list[int], drop: float = 0.0) -> Line:
    """Return a layer's metrics as the first version wrote them."""
    return {
        "layer": index,
        "aux": {"switch": 1.02, "z": 4.1},
        "load": load,
        "load_max_over_mean": max(load) * len(load) / max(1, sum(load)),
        "drop_rate": drop,
        "dropped_mass": drop * 0.8,
        "lost_tokens": 3,
        "padding_waste": 0.3,
    }


def eval_line(draw: random.Random, step: int, steps: int, layers: int, experts: int) -> Line:
    domains = ("python", "prose", "markup")
    loss = 2.3 + 3.4 * math.exp(-4 * step / steps)
    rows = [
        {
            "layer": index,
            "stability": 0.6 * math.exp(-3 * step / steps) + 0.05 * index,
            "co_selection": [
                [700 + i if i == j else 40 + 9 * ((i * j + index) % 7) for j in range(experts)]
                for i in range(experts)
            ],
            "domains": {
                name: [
                    draw.randint(20, 60) + (150 if expert % 3 == place else 0)
                    for expert in range(experts)
                ]
                for place, name in enumerate(domains)
            },
            "mutual_information": 0.4 * step / steps,
        }
        for index in range(layers)
    ]
    return line(
        "eval",
        step,
        loss=loss,
        bits_per_byte=loss / math.log(2),
        split="held_out",
        tokens=512,
        layers=rows,
    )
