"""From a step's totals and measures to the metrics that every logger gets.

What a name means and where it is measured: `totals.py` (every step), `measurement.py` (logged steps), `probe.py` (evaluations).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from dmoe.config.schema import TrainConfig
from dmoe.moe.layer import MoE
from dmoe.moe.load_balancing import coefficients
from dmoe.observability.alerts import Alerts
from dmoe.observability.hardware import measured_peak
from dmoe.train.engine import Engine
from dmoe.train.modular.attach import module_lines
from dmoe.train.reduction import LayerTotals
from dmoe.train.routing_analysis import RoutingProbe
from dmoe.train.step import StepResult
from dmoe.train.step_metrics import (
    NULL_RECORDER,
    LayerMeasures,
    NullStepRecorder,
    StepMeasures,
    StepRecorder,
)
from dmoe.train.tasks import Score

WITHOUT_LOGITS = ("fixed", "hash")
"""Routers whose scores are made up (`routers/unlearned.py`): no entropy, no logits, no probability."""
WITHOUT_ORDER = ("soft", "expert_choice")
"""Routers that list all experts of a token by id: there is no first and no second choice."""


class Telemetry:
    """What a run remembers in order to measure: the peak of the hardware, the last decisions of the probe, the alerts said."""

    def __init__(self, engine: Engine, domains: Sequence[str]) -> None:
        """Takes 0.15 s for the peak."""
        self.engine = engine
        self.peak = measured_peak(engine.process.device, engine.precision)
        self.flops_per_token = 3 * engine.model.flops_per_token(engine.task.targets)
        """Of training: backward takes twice as many as forward."""
        self.probe = RoutingProbe(engine, domains)
        self.alerts = Alerts(engine.config.alerts, engine.config.moe.top_k)
        self.measurement: NullStepRecorder = NULL_RECORDER

    def begin(self, logged: bool, began: float) -> NullStepRecorder:
        """The measurement of the step whose data have been read since `began` (`time.monotonic`)."""
        self.measurement = StepRecorder(self.engine, began) if logged else NULL_RECORDER
        return self.measurement

    def train_line(
        self, result: StepResult, *, tokens: int, learning_rate: float, seconds: float, steps: int
    ) -> dict[str, Any]:
        """One `train` line of metrics.jsonl: `tokens` since the start, `seconds` for the last `steps` steps. Collective.

        `mfu` is PaLM's model FLOP utilisation (Chowdhery et al. 2022, appendix B): the FLOPs that the model's matrix products need a
        token, forward and backward, times the tokens a second, over the measured peak of all ranks. Counted are the weights a token
        passes and causal attention (`models.size`); not counted are activations computed again, padded slots, and all that is no
        matrix product. Dropped choices are counted as if they had been computed.
        """
        measurement = self.measurement
        assert isinstance(measurement, StepRecorder), "the step that is told was not measured"
        measurement.mark("optimizer")
        measures = measurement.reduce(self.peak)
        speed = self.engine.targets * steps / seconds if seconds > 0 else math.nan
        line = train_metrics(result, measures, self.engine)
        return line | {
            "lr": learning_rate,
            "tokens": tokens,
            "tokens_per_second": speed,
            "mfu": self.flops_per_token * speed / measures.peak_flops,
        }


def is_logged(done: int, first: int, config: TrainConfig) -> bool:
    """Whether step number `done`, counted from 1, is told, in a process that began after step `first`. The same on all ranks."""
    return done % config.log_every == 0 or done in (first + 1, config.steps)


def train_metrics(result: StepResult, measures: StepMeasures, engine: Engine) -> dict[str, Any]:
    """What a `train` line says of the step itself. `aux` is the mean over the layers, `aux_weighted` what the loss got from all."""
    totals = result.totals
    score = Score(totals.loss_sum, engine.targets, totals.read_bytes)
    layers = [
        _layer(*both, engine)
        for both in zip(engine.model.moe_layers(), totals.layers, measures.layers, strict=True)
    ]
    choices = sum(sum(layer.choices) for layer in totals.layers)
    names = list(totals.layers[0].aux) if layers else []
    return {
        "loss": score.loss,
        **engine.task.measures(score),
        "aux": {
            name: statistics.fmean(layer.aux[name] for layer in totals.layers) for name in names
        },
        "aux_weighted": {
            name: sum(layer["aux_weighted"][name] for layer in layers) for name in names
        },
        "grad_norm": result.grad_norm,
        **_norms(result, measures),
        "clip_factor": result.clip_factor,
        "updated": result.updated,
        "drop_rate": 1.0 - sum(sum(layer.kept) for layer in totals.layers) / choices
        if choices
        else 0.0,
        "load_max_over_mean": max(
            (layer.load_max_over_mean for layer in totals.layers), default=1.0
        ),
        "step_time": measures.seconds,
        "bytes_exchanged": measures.exchanged_bytes,
        "straggler": measures.straggler,
        "memory": measures.memory,
        "layers": layers,
        **module_lines(engine.model, totals),
    }


def _norms(result: StepResult, measures: StepMeasures) -> dict[str, float]:
    """Three classes that share out all parameters: their squares sum to that of `grad_norm`."""
    experts, routers = result.totals.expert_squares, measures.router_squares
    squares = {
        "dense": result.totals.squares - experts - routers,
        "experts": experts,
        "router": routers,
    }
    return {f"grad_norm_{name}": _root(square) for name, square in squares.items()}


def _root(square: float) -> float:
    """A difference of float32 sums may end a little below zero."""
    return math.sqrt(max(0.0, square)) if math.isfinite(square) else math.nan


def _layer(
    built: MoE, layer: LayerTotals, measures: LayerMeasures, engine: Engine
) -> dict[str, Any]:
    load, config = layer.choices, engine.config
    mean, tokens = sum(load) / len(load), max(1.0, measures.sums["tokens"][0])
    weights = coefficients(config.moe.balance)
    line = {
        "layer": built.layer,
        "aux": layer.aux,
        "aux_weighted": {name: weights[name] * value for name, value in layer.aux.items()},
        "load": load,
        "kept": layer.kept,
        "load_by_rank": [
            sum(load[expert] for expert in owned) for owned in built.placement.experts
        ],
        "load_max_over_mean": layer.load_max_over_mean,
        "load_cv": statistics.pstdev(load) / mean if mean else 0.0,
        "dead_experts": load.count(0),
        "drop_rate": layer.drop_rate,
        "dropped_mass": layer.dropped_weight / layer.total_weight if layer.total_weight else 0.0,
        "lost_tokens": layer.fully_dropped_tokens,
        "padding_waste": layer.padding_waste,
        "effective_k": sum(layer.kept) / tokens,
        "cost_share": sum(rows * cost for rows, cost in zip(layer.kept, built.cost_E, strict=True))
        / tokens,
        "traffic": measures.traffic,
    }
    if config.moe.router.kind not in WITHOUT_ORDER:
        line |= _by_choice(measures.sums)
    if config.moe.router.kind not in WITHOUT_LOGITS:
        line |= _certainty(measures)
    if measures.bias is not None:
        line |= dict(zip(("bias_min", "bias_max", "bias_drift"), measures.bias, strict=True))
    return line


def _by_choice(sums: dict[str, list[float]]) -> dict[str, list[float]]:
    """Of a token's first, second, ... choice: the share that was dropped, and the share of the router's weight that went with it."""
    return {
        "drop_rate_by_choice": [
            1 - _share(*pair) if pair[1] else 0.0
            for pair in zip(sums["kept_K"], sums["made_K"], strict=True)
        ],
        "dropped_mass_by_choice": [
            _share(*pair) for pair in zip(sums["dropped_K"], sums["weight_K"], strict=True)
        ],
    }


def _certainty(measures: LayerMeasures) -> dict[str, float]:
    """`logit_max` is the largest absolute logit of any real token and expert, in the step, over all ranks."""
    tokens = measures.sums["tokens"][0]
    return {
        "router_entropy": _share(measures.sums["entropy"][0], tokens),
        "top1_probability": _share(measures.sums["top1"][0], tokens),
        "logit_max": measures.maxima["logit_max"],
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
