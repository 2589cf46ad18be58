"""Drops, balance and the router: means over the MoE layers, and every quantity layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from dmoe.report.figures import MOST, Reader, by_run, curve, overlay, present
from dmoe.report.page import Chart, Choice, Panel
from dmoe.report.panels_progress import at, panel
from dmoe.report.run import Run, layers_of
from dmoe.runs.metrics_log import Line, finite, number, numbers

POINTS = 200_000
"""Of all curves of single layers together: about 3 MB of HTML."""
QUANTITIES = {
    "load_max_over_mean": "Load: largest over mean",
    "load_cv": "Load: coefficient of variation",
    "dead_experts": "Experts without any token",
    "drop_rate": "Dropped share of the choices",
    "dropped_mass": "Dropped share of the router's weight",
    "lost_tokens": "Tokens with nothing left",
    "padding_waste": "Slots that stayed empty",
    "router_entropy": "Router entropy (nats)",
    "top1_probability": "Mean probability of the first choice",
    "logit_max": "Largest router logit",
    "effective_k": "Effective number of experts a token",
    "cost_share": "Cost of the experts a token took, of that of all",
    "bias_min": "Bias: smallest",
    "bias_max": "Bias: largest",
    "bias_drift": "Bias: drift",
    "stability": "Probe tokens that changed expert since the last evaluation",
    "k_loss_correlation": "Correlation of the experts a token used with its loss",
    "mutual_information": "Mutual information of expert and domain (bits)",
}
HELD_OUT = ("stability", "mutual_information", "k_loss_correlation")
"""Of evaluations: few points, so each is marked."""


def mean_of(pick: Callable[[dict[str, Any]], float | None]) -> Reader:
    """The mean over the MoE layers of a line that have the number."""
    return partial(_mean_of, pick)


def _mean_of(pick: Callable[[dict[str, Any]], float | None], line: Line) -> float | None:
    found = [value for row in layers_of(line).values() if (value := pick(row)) is not None]
    return fmean(found) if found else None


def key(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda row: finite(row.get(name))


def choice(name: str, position: int) -> Callable[[dict[str, Any]], float | None]:
    def pick(row: dict[str, Any]) -> float | None:
        values = numbers(row.get(name))
        return values[position] if position < len(values) else None

    return pick


def drops(runs: Sequence[Run]) -> Panel:
    most = max((_choices(run) for run in runs), default=0)
    by_choice = {f"choice {k + 1}": mean_of(choice("drop_rate_by_choice", k)) for k in range(most)}
    mass = {f"choice {k + 1}": mean_of(choice("dropped_mass_by_choice", k)) for k in range(most)}
    share = (
        "Share of the choices (tokens x experts a token) that found no slot, over all MoE layers."
    )
    charts = [
        overlay("drop-rate", "Drop rate", share, "share", runs, {"": at("drop_rate")}),
        by_run(
            "drop-by-choice",
            "Drop rate by choice",
            "Choice 1 is a token's best expert. Mean over the layers.",
            "share",
            runs,
            by_choice,
        ),
        overlay(
            "dropped-mass",
            "Dropped router weight",
            "Share of the weights that fell with the dropped choices. Mean over the layers.",
            "share",
            runs,
            {"": mean_of(key("dropped_mass"))},
        ),
        by_run(
            "mass-by-choice",
            "Dropped router weight by choice",
            "Mean over the layers.",
            "share",
            runs,
            mass,
        ),
        overlay(
            "lost",
            "Tokens with nothing left",
            "They pass on the residual stream alone. Mean over the layers.",
            "tokens",
            runs,
            {"": mean_of(key("lost_tokens"))},
        ),
        overlay(
            "padding",
            "Empty slots",
            "Share of the slots no token took: computed for nothing. Mean over the layers.",
            "share",
            runs,
            {"": mean_of(key("padding_waste"))},
        ),
    ]
    return panel(
        "drops",
        "Drops",
        charts,
        "No drop was recorded: a dense model, or an older version of dmoe.",
    )


def _choices(run: Run) -> int:
    rows = (row for line in run.train[-1:] for row in layers_of(line).values())
    return max((len(numbers(row.get("drop_rate_by_choice"))) for row in rows), default=0)


def balance(runs: Sequence[Run]) -> Panel:
    names = sorted(
        {name for run in runs for line in run.train[-1:] for name in _mapping(line.get("aux"))}
    )
    worst = (
        "The fullest expert's load over the mean, of the least even layer; 1 is perfect balance."
    )
    charts = [
        overlay(
            "max-over-mean",
            "Largest load over mean",
            worst,
            "factor",
            runs,
            {"": at("load_max_over_mean")},
        ),
        overlay(
            "cv",
            "Coefficient of variation of the load",
            "Mean over the layers; 0 is perfect balance.",
            "ratio",
            runs,
            {"": mean_of(key("load_cv"))},
        ),
        overlay(
            "dead",
            "Experts without any token",
            "Mean over the layers.",
            "experts",
            runs,
            {"": mean_of(key("dead_experts"))},
        ),
        *(
            overlay(
                f"aux-{name}",
                f"Loss: {name}",
                "Without its coefficient. Mean over the layers.",
                "raw",
                runs,
                {"": at("aux", name)},
            )
            for name in names
        ),
        by_run(
            "aux-weighted",
            "Auxiliary losses, weighted",
            "As they enter the training loss.",
            "nats",
            runs,
            {name: at("aux_weighted", name) for name in names},
        ),
        overlay(
            "bias",
            "Bias of the experts",
            "Smallest and largest, mean over the layers.",
            "score",
            runs,
            {"smallest": mean_of(key("bias_min")), "largest": mean_of(key("bias_max"))},
        ),
    ]
    return panel("balance", "Balance", charts, "No measure of balance was recorded.")


def router(runs: Sequence[Run]) -> Panel:
    charts = [
        overlay(
            "entropy",
            "Router entropy",
            "Of the scores of one token; low means sure, log E means undecided. Mean over the layers.",
            "nats",
            runs,
            {"": mean_of(key("router_entropy"))},
        ),
        overlay(
            "top1",
            "Probability of the first choice",
            "Mean over tokens and layers.",
            "share",
            runs,
            {"": mean_of(key("top1_probability"))},
        ),
        overlay(
            "logit",
            "Largest router logit",
            "Growth without end is saturation. Mean over the layers.",
            "logit",
            runs,
            {"": mean_of(key("logit_max"))},
        ),
        overlay(
            "effective-k",
            "Effective experts a token",
            "Mean over the layers.",
            "experts",
            runs,
            {"": mean_of(key("effective_k"))},
        ),
        _held_out(
            runs,
            "stability",
            "Routing changes",
            "Share of fixed probe tokens whose expert changed since the last evaluation. Mean over the layers.",
            "share",
        ),
    ]
    return panel(
        "router",
        "Router",
        charts,
        "Entropy and certainty of the router were not recorded in these runs.",
    )


def _held_out(runs: Sequence[Run], name: str, title: str, caption: str, unit: str) -> Chart | None:
    return overlay(name, title, caption, unit, runs, {}, held_out=mean_of(key(name)))


def layers(runs: Sequence[Run]) -> Panel:
    """One chart for any quantity of any run, a curve for each layer."""
    known = {**QUANTITIES, **{f"aux {name}": f"Loss: {name}, raw" for name in _losses(runs)}}
    measured = {name: [_by_layer(run, name) for run in runs] for name in known}
    measured = {name: found for name, found in measured.items() if any(found)}
    most = max(
        24,
        min(
            MOST,
            POINTS // max(1, sum(len(layers) for found in measured.values() for layers in found)),
        ),
    )
    views = {
        f"{index}|{position}": {
            "curves": present(
                _curve(layer, lines, name, len(by_layer), most) for layer, lines in by_layer.items()
            ),
            "marks": [index],
        }
        for position, (name, found) in enumerate(measured.items())
        for index, by_layer in enumerate(found)
        if by_layer
    }
    choices = [
        Choice("Run", [run.name for run in runs]),
        Choice("Quantity", [known[name] for name in measured]),
    ]
    caption = "One curve for each MoE layer, from the first (dark blue) to the last (red)."
    chart = Chart(
        "by-layer",
        "Any quantity, layer by layer",
        caption,
        "curves",
        views,
        {"x": "step", "y": ""},
        choices,
        wide=True,
    )
    return panel(
        "layers",
        "Layer by layer",
        [chart if views else None],
        "No layer was recorded: a dense model, or no step was logged.",
    )


def _losses(runs: Sequence[Run]) -> list[str]:
    return sorted(
        {
            name
            for run in runs
            for line in run.train[-1:]
            for row in layers_of(line).values()
            for name in _mapping(row.get("aux"))
        }
    )


def _by_layer(run: Run, name: str) -> dict[int, list[Line]]:
    """By layer, lines of {step, value}, where there is a value."""
    group, _, loss = name.partition(" ")
    found: dict[int, list[Line]] = {}
    for line in (*run.train, *run.evals):
        for layer, row in layers_of(line).items():
            value = number(row, group, loss) if loss else number(row, name)
            if value is not None:
                found.setdefault(layer, []).append({"step": line["step"], "value": value})
    return dict(sorted(found.items()))


def _curve(
    layer: int, lines: list[Line], name: str, count: int, most: int
) -> dict[str, Any] | None:
    return curve(
        f"layer {layer}",
        lines,
        at("value"),
        most=most,
        depth=layer / max(1, count - 1),
        markers=name in HELD_OUT,
    )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
