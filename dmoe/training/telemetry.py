"""From a step's totals to the metrics that every logger gets."""

from __future__ import annotations

import math
from typing import Any

from dmoe.training.evaluation import bits_per_byte
from dmoe.training.step import StepResult
from dmoe.training.totals import LayerTotals

__all__ = ["flatten", "train_metrics"]


def train_metrics(
    result: StepResult, *, targets: int, tokens: int, learning_rate: float, seconds: float, steps: int
) -> dict[str, Any]:
    """One `train` line of metrics.jsonl. `targets`: of one step; `tokens`: since the start; `seconds` for the last `steps` steps."""
    totals = result.totals
    layers = [_layer(index, layer) for index, layer in enumerate(totals.layers)]
    choices = sum(sum(layer.choices) for layer in totals.layers)
    return {
        "loss": totals.loss_sum / targets,
        "bits_per_byte": bits_per_byte(totals.loss_sum, totals.read_bytes),
        "aux": {name: _mean([layer.aux[name] for layer in totals.layers]) for name in (totals.layers[0].aux if layers else {})},
        "grad_norm": result.grad_norm,
        "clip_factor": result.clip_factor,
        "updated": result.updated,
        "lr": learning_rate,
        "tokens": tokens,
        "tokens_per_second": targets * steps / seconds if seconds > 0 else math.nan,
        "drop_rate": 1.0 - sum(sum(layer.kept) for layer in totals.layers) / choices if choices else 0.0,
        "load_max_over_mean": max((layer.load_max_over_mean for layer in totals.layers), default=1.0),
        "layers": layers,
    }


def _layer(index: int, layer: LayerTotals) -> dict[str, Any]:
    return {
        "layer": index,
        "aux": layer.aux,
        "load": layer.choices,
        "load_max_over_mean": layer.load_max_over_mean,
        "drop_rate": layer.drop_rate,
        "dropped_mass": layer.dropped_weight / layer.total_weight if layer.total_weight else 0.0,
        "lost_tokens": layer.lost_tokens,
        "padding_waste": layer.padding_waste,
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Scalars for trackers, under names that group by layer: `layers/0/drop_rate`, `aux/switch`. Lists of numbers are left out."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for index, item in enumerate(value):
                flat |= flatten(item, f"{prefix}{key}/{index}/")
        elif isinstance(value, int | float):
            flat[f"{prefix}{key}"] = float(value)
    return flat
