"""Panels of curves about MoE layers: drops, balance, router, and each layer by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dmoe.report.charts import (
    MAX_POINTS,
    CurveChart,
    Reader,
    at,
    curve_panel,
    layer_mean,
    layer_sum,
    make_curve,
)
from dmoe.report.format import format_number
from dmoe.report.page import Chart, Panel, Selector
from dmoe.report.run import Run, as_dict, layers_of
from dmoe.runs.metrics_log import Line, number, numbers

MEAN = "Mean over the MoE layers."
MOVED = "Since the last logged step, of all MoE layers (parallel.placement)."
ROUTER_CHARTS = (
    CurveChart(
        "entropy",
        "Router entropy",
        f"Of the scores of one token; 0 is a certain router, log E an undecided one. {MEAN}",
        "nats",
        {"": layer_mean("router_entropy")},
    ),
    CurveChart(
        "top1",
        "Probability of the first choice",
        "Mean over tokens and MoE layers.",
        "share",
        {"": layer_mean("top1_probability")},
    ),
    CurveChart(
        "logit",
        "Largest router logit",
        f"Steady growth is saturation. {MEAN}",
        "logit",
        {"": layer_mean("logit_max")},
    ),
    CurveChart(
        "effective-k",
        "Effective experts per token",
        MEAN,
        "experts",
        {"": layer_mean("effective_k")},
    ),
    CurveChart(
        "stability",
        "Routing changes",
        "Share of fixed probe tokens whose expert changed since the last evaluation. " + MEAN,
        "share",
        evaluation=layer_mean("stability"),
    ),
)
MAX_LAYER_POINTS = 60_000
"""Points of all curves of single layers together: about 1 MB of HTML."""
MIN_LAYER_POINTS = 24
LAYER_QUANTITIES = {
    "load_max_over_mean": "Load: largest over mean",
    "rank_max_over_mean": "Rows of the ranks: largest over mean",
    "max_vio": "MaxVio: largest load over mean, less 1",
    "load_cv": "Load: coefficient of variation",
    "dead_experts": "Experts without any token",
    "drop_rate": "Dropped share of the assignments",
    "dropped_mass": "Dropped share of the router weight",
    "lost_tokens": "Fully dropped tokens",
    "padding_waste": "Empty slots",
    "fullest_pool": "Fullest pool: share of its slots in use",
    "emptiest_pool": "Emptiest pool: share of its slots in use",
    "router_entropy": "Router entropy (nats)",
    "top1_probability": "Mean probability of the first choice",
    "logit_max": "Largest router logit",
    "effective_k": "Effective number of experts per token",
    "cost_share": "Cost of a token's experts, as a share of all experts",
    "bias_min": "Bias: smallest",
    "bias_max": "Bias: largest",
    "bias_drift": "Bias: drift",
    "stability": "Probe tokens whose expert changed since the last evaluation",
    "k_loss_correlation": "Correlation of experts per token and the token's loss",
    "mutual_information": "Mutual information of expert and domain (bits)",
}
EVALUATED = ("stability", "mutual_information", "k_loss_correlation")
"""Quantities of evaluations: few points, so they are drawn with markers."""


def drops_panel(runs: Sequence[Run]) -> Panel:
    """Build dropped assignments, by choice too, and empty slots."""
    choices = range(max((_num_choices(run) for run in runs), default=0))

    def by_choice(key: str) -> dict[str, Reader]:
        return {f"choice {k + 1}": layer_mean(key, k) for k in choices}

    charts = (
        CurveChart(
            "drop-rate",
            "Drop rate",
            "Share of the assignments (tokens x experts per token) without a slot, all MoE layers.",
            "share",
            {"": at("drop_rate")},
        ),
        CurveChart(
            "drop-by-choice",
            "Drop rate by choice",
            f"Choice 1 is a token's best expert. {MEAN}",
            "share",
            by_choice("drop_rate_by_choice"),
            layout="per_run",
        ),
        CurveChart(
            "dropped-mass",
            "Dropped router weight",
            f"Share of the router weights that belongs to dropped assignments. {MEAN}",
            "share",
            {"": layer_mean("dropped_mass")},
        ),
        CurveChart(
            "mass-by-choice",
            "Dropped router weight by choice",
            MEAN,
            "share",
            by_choice("dropped_mass_by_choice"),
            layout="per_run",
        ),
        CurveChart(
            "lost",
            "Fully dropped tokens",
            f"They keep only the residual stream. {MEAN}",
            "tokens",
            {"": layer_mean("lost_tokens")},
        ),
        CurveChart(
            "padding",
            "Empty slots",
            f"Share of the slots without a token, computed for nothing. {MEAN}",
            "share",
            {"": layer_mean("padding_waste")},
        ),
        CurveChart(
            "pools",
            "Slots in use by pool",
            f"Of the pools of experts that share slots, the fullest and the emptiest. {MEAN}",
            "share",
            {"fullest": layer_mean("fullest_pool"), "emptiest": layer_mean("emptiest_pool")},
            layout="per_run",
        ),
    )
    absent = "No drop was recorded: a dense model, or an older version of dmoe."
    return curve_panel("drops", "Drops", charts, runs, absent)


def _num_choices(run: Run) -> int:
    rows = (row for line in run.train[-1:] for row in layers_of(line).values())
    return max((len(numbers(row.get("drop_rate_by_choice"))) for row in rows), default=0)


def balance_panel(runs: Sequence[Run]) -> Panel:
    """Build measures of the load, auxiliary losses and the bias."""
    last_lines = [line for run in runs for line in run.train[-1:]]
    losses = sorted({name for line in last_lines for name in as_dict(line.get("aux"))})
    charts = [
        CurveChart(
            "max-over-mean",
            "Largest load over mean",
            "Of the least balanced layer; 1 is perfect balance.",
            "factor",
            {"": at("load_max_over_mean")},
        ),
        CurveChart(
            "rank-max-over-mean",
            "Rows of the busiest rank over the mean",
            "Of the least balanced layer.",
            "factor",
            {"": at("rank_max_over_mean")},
        ),
        *(
            CurveChart(key, title, MOVED, unit, {"": at(key)})
            for key, title, unit in (
                ("moves", "Experts moved to another rank", "experts"),
                ("moved_bytes", "Bytes of moved experts, of all ranks", "bytes"),
                ("move_seconds", "Time of moves, of one rank", "seconds"),
            )
        ),
        CurveChart(
            "cv",
            "Coefficient of variation of the load",
            f"0 is perfect balance. {MEAN}",
            "ratio",
            {"": layer_mean("load_cv")},
        ),
        CurveChart(
            "dead",
            "Experts without any token",
            "Of all MoE layers together.",
            "experts",
            {"": layer_sum("dead_experts")},
        ),
        *(
            CurveChart(
                f"aux-{name}",
                f"Auxiliary loss: {name}",
                f"Without its coefficient. {MEAN}",
                "raw",
                {"": at("aux", name)},
            )
            for name in losses
        ),
        CurveChart(
            "aux-weighted",
            "Auxiliary losses, weighted",
            "As added to the training loss.",
            "nats",
            {name: at("aux_weighted", name) for name in losses},
            layout="per_run",
        ),
        CurveChart(
            "bias",
            "Load-balancing bias",
            f"Smallest and largest. {MEAN}",
            "score",
            {"smallest": layer_mean("bias_min"), "largest": layer_mean("bias_max")},
        ),
    ]
    return curve_panel("balance", "Balance", charts, runs, "No measure of balance was recorded.")


def router_panel(runs: Sequence[Run]) -> Panel:
    """Build entropy and logits of the router, and how often its choices change."""
    absent = "Entropy and certainty of the router were not recorded in these runs."
    return curve_panel("router", "Router", ROUTER_CHARTS, runs, absent)


def layers_panel(runs: Sequence[Run]) -> Panel:
    """Build one chart for any quantity of any run, with a curve per MoE layer."""
    last_rows = [row for run in runs for line in run.train[-1:] for row in layers_of(line).values()]
    losses = sorted({name for row in last_rows for name in as_dict(row.get("aux"))})
    paths: dict[str, tuple[str, ...]] = {name: (key,) for key, name in LAYER_QUANTITIES.items()}
    paths |= {f"Auxiliary loss: {name}": ("aux", name) for name in losses}
    found = {title: [_values_by_layer(run, path) for run in runs] for title, path in paths.items()}
    recorded = {title: by_run for title, by_run in found.items() if any(by_run)}
    if not recorded:
        absent = "No layer was recorded: a dense model, or no step was logged."
        return Panel("layers", "Layer by layer", [absent])
    constant = {title: value for title in recorded if (value := _constant_value(recorded[title]))}
    measured = {title: by_run for title, by_run in recorded.items() if title not in constant}
    remarks = [f"{title}: {value}" for title, value in constant.items()]
    if not measured:
        return Panel("layers", "Layer by layer", constant=remarks)
    num_curves = sum(len(layers) for by_run in measured.values() for layers in by_run)
    max_points = min(MAX_POINTS, max(MIN_LAYER_POINTS, MAX_LAYER_POINTS // num_curves))
    views = {
        f"{index}|{position}": {
            "curves": _layer_curves(layers, paths[title][0] in EVALUATED, max_points),
            "marks": [index],
        }
        for position, (title, by_run) in enumerate(measured.items())
        for index, layers in enumerate(by_run)
        if layers
    }
    chart = Chart(
        "by-layer",
        "Any quantity, layer by layer",
        "One curve per MoE layer, from the first (dark blue) to the last (red).",
        "curves",
        views,
        {"x": "step", "y": ""},
        [Selector("Run", [run.name for run in runs]), Selector("Quantity", list(measured))],
        wide=True,
    )
    return Panel("layers", "Layer by layer", charts=[chart], constant=remarks)


def _constant_value(by_run: Sequence[dict[int, list[Line]]]) -> str | None:
    """Return the value of a quantity that is the same in all layers and steps, else None."""
    lines = [line for layers in by_run for lines in layers.values() for line in lines]
    values = {line["value"] for line in lines}
    return format_number(values.pop()) if len(values) == 1 and len(lines) > 1 else None


def _values_by_layer(run: Run, path: tuple[str, ...]) -> dict[int, list[Line]]:
    """Return lines of {step, value} by layer, without missing values."""
    found: dict[int, list[Line]] = {}
    for line in (*run.train, *run.evals):
        for layer, row in layers_of(line).items():
            value = number(row, *path)
            if value is not None:
                found.setdefault(layer, []).append({"step": line["step"], "value": value})
    return dict(sorted(found.items()))


def _layer_curves(
    layers: dict[int, list[Line]], markers: bool, max_points: int
) -> list[dict[str, Any] | None]:
    deepest = max(1, len(layers) - 1)
    return [
        make_curve(
            f"layer {layer}",
            lines,
            at("value"),
            max_points=max_points,
            depth=layer / deepest,
            markers=markers,
        )
        for layer, lines in layers.items()
    ]
