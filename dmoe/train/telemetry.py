"""Metrics of a step as they are logged.

They are measured in `reduction.py` (every step), `step_metrics.py` (logged steps) and
`routing_analysis.py` (evaluations).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

from dmoe.config.router_kinds import router_spec
from dmoe.config.schema import TrainConfig
from dmoe.moe.base_layer import MoELayer
from dmoe.moe.copy_planner import CopyTotals
from dmoe.moe.load_balancing import coefficients
from dmoe.moe.placement_plan import max_over_mean
from dmoe.observability.alerts import Alerts
from dmoe.observability.profiler import measure_peak_flops
from dmoe.train.engine import Engine
from dmoe.train.modular.attach import module_metrics
from dmoe.train.reduction import NULL_RECORDER, LayerTotals, NullStepRecorder
from dmoe.train.routing_analysis import RoutingProbe
from dmoe.train.step import StepResult
from dmoe.train.step_metrics import LayerMetrics, StepMetrics, StepRecorder
from dmoe.train.tasks import Score


def is_logged(step: int, start_step: int, config: TrainConfig) -> bool:
    """Return whether step `step`, from 1, of a process that began after `start_step` is logged."""
    return step % config.log_every == 0 or step in (start_step + 1, config.steps)


class Telemetry:
    """Measures a run: peak FLOP/s of the hardware, routing probe, alerts, step recorder."""

    def __init__(self, engine: Engine, domains: Sequence[str]) -> None:
        """Measure the peak FLOP/s, which takes 0.15 s. `domains`: names of the data's domains."""
        self.engine = engine
        self.peak_flops = measure_peak_flops(engine.process.device, engine.precision)
        self.flops_per_token = 3 * engine.model.flops_per_token(engine.task.targets_per_sample)
        """Of training: backward takes twice as many FLOPs as forward."""
        self.probe = RoutingProbe(engine, domains)
        self.alerts = Alerts(engine.config.alerts, engine.config.moe.top_k)
        self.recorder: StepRecorder | None = None

    def start_recording(self, began: float) -> StepRecorder:
        """Start to record a step whose data were read since `began` (`time.monotonic`)."""
        self.recorder = StepRecorder(self.engine, began)
        return self.recorder

    def recorder_of(self, step: int, start_step: int, began: float) -> NullStepRecorder:
        """Return a recorder of step `step`, from 1: one that records if the step is logged."""
        logged = is_logged(step, start_step, self.engine.config.train)
        return self.start_recording(began) if logged else NULL_RECORDER

    def train_record(
        self,
        result: StepResult,
        *,
        tokens: int,
        interval_tokens: int,
        learning_rate: float,
        seconds: float,
    ) -> dict[str, Any]:
        """Return the values of a `train` line in metrics.jsonl. Collective.

        `mfu` is PaLM's model FLOP utilization (Chowdhery et al. 2022, appendix B): the FLOPs per
        token of the model's matrix products, forward and backward, times the tokens per second,
        over the measured peak of all ranks. Counted are the weights that a token passes and causal
        attention (`models.flops`); not counted are recomputed activations, padded slots and
        everything that is no matrix product. Dropped assignments count as if computed.

        Args:
            result: of the step in the recorder.
            tokens: since the start of the run, without padding.
            interval_tokens: since the last `train` line.
            learning_rate: of the step.
            seconds: since then, without evaluations and saves.
        """
        assert self.recorder is not None, "only a recorded step can be logged"
        recorder, self.recorder = self.recorder, None
        recorder.mark("optimizer")
        metrics = recorder.reduce(self.peak_flops)
        speed = interval_tokens / seconds if seconds > 0 else math.nan
        mfu = self.flops_per_token * speed / metrics.peak_flops
        return train_metrics(result, metrics, self.engine) | {
            "lr": learning_rate,
            "tokens": tokens,
            "tokens_per_second": speed,
            "mfu": mfu,
        }


def basic_metrics(result: StepResult, engine: Engine) -> dict[str, Any]:
    """Return what is known of any step, logged or not; equal on all ranks."""
    totals = result.totals
    score = Score(totals.loss_sum, totals.num_targets, totals.target_bytes)
    return {
        "loss": score.loss,
        **engine.task.metrics(score),
        "grad_norm": result.grad_norm,
        "clip_factor": result.clip_factor,
        "updated": result.updated,
    }


def train_metrics(result: StepResult, metrics: StepMetrics, engine: Engine) -> dict[str, Any]:
    """Return the part of a `train` line that concerns the step itself.

    `aux` is the mean of an auxiliary loss over the MoE layers, `aux_weighted` the sum over the
    layers of what it adds to the loss.
    """
    totals = result.totals
    layers = [
        _layer_metrics(*layer, engine)
        for layer in zip(engine.model.moe_layers(), totals.layers, metrics.layers, strict=True)
    ]
    choices = sum(sum(layer.choice_counts) for layer in totals.layers)
    kept = sum(sum(layer.kept_counts) for layer in totals.layers)
    names = list(totals.layers[0].aux) if layers else []
    largest = max((layer.load_max_over_mean for layer in totals.layers), default=1.0)
    moved = {} if engine.placement is None else engine.placement.take_metrics()
    if engine.mesh.ep > 1 and layers:
        moved["rank_max_over_mean"] = max(layer["rank_max_over_mean"] for layer in layers)
    return basic_metrics(result, engine) | {
        "aux": {
            name: statistics.fmean(layer.aux[name] for layer in totals.layers) for name in names
        },
        "aux_weighted": {
            name: sum(layer["aux_weighted"][name] for layer in layers) for name in names
        },
        **_grad_norms(result, metrics),
        "drop_rate": 1.0 - kept / choices if choices else 0.0,
        "load_max_over_mean": largest,
        "max_vio": largest - 1,
        **moved,
        "step_time": metrics.seconds,
        "bytes_exchanged": metrics.all_to_all_bytes,
        "straggler": metrics.straggler,
        "memory": metrics.memory,
        **_copy_metrics(metrics.copies),
        "layers": layers,
        **module_metrics(engine.model, totals),
    }


def _copy_metrics(layers: list[CopyTotals]) -> dict[str, float]:
    """Return what copies for the step did, over all layers; empty without them.

    `rank_imbalance` is max/mean of the rows over the ranks of an EP group, `rank_imbalance_fixed`
    the same if nothing were copied: the compute that copies save is the difference.
    """
    if not layers:
        return {}
    copies, size, fixed, rows, even = (sum(n) for n in zip(*map(astuple, layers), strict=True))
    return {
        "copies": int(copies),
        "copy_bytes": int(size),
        "rank_imbalance": rows / even if even else 1.0,
        "rank_imbalance_fixed": fixed / even if even else 1.0,
    }


def _grad_norms(result: StepResult, metrics: StepMetrics) -> dict[str, float]:
    """Return the norms of three classes of parameters; their squares add up to `grad_norm`'s."""
    experts = result.totals.squared_expert_grad_norm
    routers = metrics.squared_router_grad_norm
    squares = {
        "dense": result.totals.squared_grad_norm - experts - routers,
        "experts": experts,
        "router": routers,
    }
    return {f"grad_norm_{name}": _safe_sqrt(square) for name, square in squares.items()}


def _safe_sqrt(square: float) -> float:
    """Return the root; a difference of float32 sums may end a little below zero."""
    return math.sqrt(max(0.0, square)) if math.isfinite(square) else math.nan


def _layer_metrics(
    moe: MoELayer, layer: LayerTotals, metrics: LayerMetrics, engine: Engine
) -> dict[str, Any]:
    """Return the entry of one MoE layer in `layers` of a `train` line."""
    load, kept, config = layer.choice_counts, layer.kept_counts, engine.config.moe
    mean, tokens = sum(load) / len(load), max(1.0, metrics.sums["tokens"][0])
    weights, router = coefficients(config.balance), router_spec(config.router.kind)
    cost = sum(rows * cost for rows, cost in zip(kept, moe.cost_E, strict=True))
    values = {
        "layer": moe.layer,
        "aux": layer.aux,
        "aux_weighted": {name: weights[name] * value for name, value in layer.aux.items()},
        "load": load,
        "kept": kept,
        "load_by_rank": [sum(load[expert] for expert in ids) for ids in moe.placement.experts],
        "rank_max_over_mean": max_over_mean(kept, moe.placement),
        "load_max_over_mean": layer.load_max_over_mean,
        "max_vio": layer.load_max_over_mean - 1,
        "load_cv": statistics.pstdev(load) / mean if mean else 0.0,
        "dead_experts": load.count(0),
        "drop_rate": layer.drop_rate,
        "dropped_mass": layer.dropped_weight / layer.total_weight if layer.total_weight else 0.0,
        "lost_tokens": layer.fully_dropped_tokens,
        "padding_waste": layer.padding_waste,
        "effective_k": sum(kept) / tokens,
        "cost_share": cost / tokens,
        "traffic": metrics.traffic,
    }
    if config.capacity.pool > 1:
        values |= _metrics_by_pool(layer, config.capacity.pool)
    if router.ordered_choices:
        values |= _metrics_by_choice(metrics.sums)
    if router.learned:
        values |= _router_confidence(metrics)
    if metrics.bias is not None:
        values |= dict(zip(("bias_min", "bias_max", "bias_drift"), metrics.bias, strict=True))
    return values


def _metrics_by_pool(layer: LayerTotals, pool: int) -> dict[str, Any]:
    """Return for each pool the share of its slots that is used, and choices minus computed rows.

    The latter are its drops; with `next_choice`, less what other pools' drops brought.
    """
    computed = range(0, len(layer.kept_counts) - layer.num_zero_cost, pool)
    kept, made = (
        [sum(counts[first : first + pool]) for first in computed]
        for counts in (layer.kept_counts, layer.choice_counts)
    )
    used = [_ratio(rows * len(kept), layer.slots) for rows in kept]
    return {
        "slots_used_by_pool": used,
        "dropped_by_pool": [a - b for a, b in zip(made, kept, strict=True)],
        "fullest_pool": max(used),
        "emptiest_pool": min(used),
    }


def _metrics_by_choice(sums: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return per choice (first, second ...) the fraction dropped, of assignments and of weight."""
    return {
        "drop_rate_by_choice": [
            1 - _ratio(kept, selected) if selected else 0.0
            for kept, selected in zip(sums["kept_K"], sums["made_K"], strict=True)
        ],
        "dropped_mass_by_choice": [
            _ratio(dropped, total)
            for dropped, total in zip(sums["dropped_K"], sums["weight_K"], strict=True)
        ],
    }


def _router_confidence(metrics: LayerMetrics) -> dict[str, float]:
    """Return entropy, top-1 probability and the largest absolute logit, over all real tokens."""
    tokens = metrics.sums["tokens"][0]
    return {
        "router_entropy": _ratio(metrics.sums["entropy"][0], tokens),
        "top1_probability": _ratio(metrics.sums["top1"][0], tokens),
        "logit_max": metrics.maxima["logit_max"],
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
