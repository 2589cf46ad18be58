"""Panels that every training run has: domains, gradients and learning rate, time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dmoe.report.charts import CurveChart, at, curve_panel
from dmoe.report.page import Panel, Table
from dmoe.report.results import domain_rows
from dmoe.report.run import Run

STEP_PARTS = ("data", "forward", "backward", "exchange", "optimizer", "other")
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
    CurveChart(
        "rank-imbalance",
        "Rows per rank, max over mean",
        "Of the ranks that share the experts: with copies for the step, and without.",
        "factor",
        {"with copies": at("rank_imbalance"), "without": at("rank_imbalance_fixed")},
    ),
    CurveChart(
        "copy-bytes",
        "Bytes of copies",
        "Weights of copied experts and gradients of the copies in one step; part of the bytes "
        "exchanged.",
        "bytes per step",
        {"": at("copy_bytes")},
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


def domains_panel(runs: Sequence[Run]) -> Panel | None:
    """Build the validation metric by domain, at the first and the last evaluation.

    None if the data has one domain, as most do.
    """
    tables = []
    for run in runs:
        head, rows = domain_rows(run.evals)
        if len(rows) > 1:
            caption = "Validation, by domain" + (f", {run.name}" if len(runs) > 1 else "")
            tables.append(Table(caption, [name.replace("\n", " ") for name in head], rows))
    return Panel("domains-table", "Validation by domain", tables=tables) if tables else None


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
    return replace(panel, sentences=["The parts of the step time were not recorded."])
