"""Panels that every training run has: quality, gradients and learning rate, time and memory."""

from __future__ import annotations

from collections.abc import Sequence

from dmoe.report.charts import CurveChart, at, curve_panel
from dmoe.report.page import Panel, Table
from dmoe.report.results import domain_rows
from dmoe.report.run import Run

STEP_PARTS = ("data", "forward", "backward", "exchange", "optimizer", "other")
HELD_OUT = (
    "Points with markers are validation data, the other line is the training batch of that step."
)
QUALITY_CHARTS = (
    CurveChart(
        "loss",
        "Loss",
        f"Lower is better. {HELD_OUT}",
        "nats per target",
        {"training": at("loss")},
        evaluation=at("loss"),
    ),
    CurveChart(
        "bits-per-byte",
        "Bits per byte",
        f"Lower is better. {HELD_OUT} Comparable between tokenizers.",
        "bits per byte",
        {"training": at("bits_per_byte")},
        evaluation=at("bits_per_byte"),
    ),
    CurveChart(
        "accuracy",
        "Accuracy",
        f"Share of the targets that were predicted correctly; higher is better. {HELD_OUT}",
        "share",
        {"training": at("accuracy")},
        evaluation=at("accuracy"),
    ),
)
GRADIENT_CHARTS = (
    CurveChart(
        "grad-norm",
        "Gradient norm",
        "Before clipping, of all parameters and of each class.",
        "norm",
        {
            "all": at("grad_norm"),
            "dense": at("grad_norm_dense"),
            "experts": at("grad_norm_experts"),
            "router": at("grad_norm_router"),
        },
    ),
    CurveChart(
        "clip",
        "Clip factor",
        "Factor applied to the gradient; 1 if its norm was below the limit.",
        "factor",
        {"": at("clip_factor")},
    ),
    CurveChart("lr", "Learning rate", "As scheduled for each step.", "rate", {"": at("lr")}),
)
TIME_CHARTS = (
    CurveChart(
        "speed",
        "Tokens per second",
        "Over all ranks, without evaluations and checkpoints.",
        "tokens/s",
        {"": at("tokens_per_second")},
    ),
    CurveChart(
        "time-split",
        "Step time by part",
        "Seconds of one step, stacked.",
        "s per step",
        {part: at("step_time", part) for part in STEP_PARTS},
        layout="stacked",
    ),
    CurveChart(
        "straggler",
        "Straggler factor",
        "Time of the slowest rank over the mean; 1 means that no rank waits.",
        "factor",
        {"": at("straggler")},
    ),
    CurveChart(
        "exchanged",
        "Bytes exchanged",
        "Sent between ranks in one step.",
        "bytes per step",
        {"": at("bytes_exchanged")},
    ),
    CurveChart("memory", "Memory", "Peak of the rank with the most.", "bytes", {"": at("memory")}),
    CurveChart(
        "mfu",
        "Model FLOPs utilization",
        "Model FLOPs per second as a share of the measured peak.",
        "share",
        {"": at("mfu")},
    ),
)


def quality_panel(runs: Sequence[Run]) -> Panel:
    """Build loss, bits per byte or accuracy, and the validation metric by domain."""
    absent = "No step of training and no evaluation was recorded."
    panel = curve_panel("quality", "Loss, bits per byte, accuracy", QUALITY_CHARTS, runs, absent)
    tables = []
    for run in runs:
        head, rows = domain_rows(run.evals)
        if len(rows) > 1:
            caption = "Validation, by domain" + (f", {run.name}" if len(runs) > 1 else "")
            tables.append(Table(caption, [name.replace("\n", " ") for name in head], rows))
    return Panel(panel.id, panel.title, panel.sentences, charts=panel.charts, tables=tables)


def gradients_panel(runs: Sequence[Run]) -> Panel:
    """Build gradient norms, clipping and the learning rate."""
    absent = "No gradient norm was recorded."
    return curve_panel("gradients", "Gradients and learning rate", GRADIENT_CHARTS, runs, absent)


def time_panel(runs: Sequence[Run]) -> Panel:
    """Build speed, step time, bytes and memory."""
    absent = "No speed was recorded."
    panel = curve_panel("time", "Time, bytes and memory", TIME_CHARTS, runs, absent)
    if not panel.charts or any(chart.id == "time-split" for chart in panel.charts):
        return panel
    sentences = ["The parts of the step time were not recorded."]
    return Panel(panel.id, panel.title, sentences, charts=panel.charts)
