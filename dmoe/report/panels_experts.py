"""Panels of matrices: expert load, rows between ranks, co-selection, and load by domain.

Letters: E experts, L MoE layers, EP ranks that share the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, pstdev
from typing import Any

from dmoe.report.charts import (
    CurveChart,
    View,
    build_curve_chart,
    build_matrix_chart,
    layer_mean,
    most_imbalanced_steps,
)
from dmoe.report.format import BYTES_PER_NUMBER, format_bytes, format_number
from dmoe.report.page import Chart, Panel, Selector, Table, round_number
from dmoe.report.run import Run, layers_of
from dmoe.runs.metrics_log import Line, matrix, numbers

MAX_LOAD_CELLS = 700_000
"""Cells of all load matrices over steps together: about 4 MB of HTML."""
MIN_STEPS, MAX_STEPS = 24, 600
"""Steps of one load matrix."""
MAX_LISTED_LAYERS = 12
"""Layers in the table of extreme loads, the least balanced first."""
NUM_EXTREMES = 3
LOAD_AXES = {"z": "times the fair share", "count": "assignments"}

LoadHistory = dict[int, list[tuple[int, list[float]]]]
"""By layer: (step, load of its E experts)."""


def load_panel(runs: Sequence[Run]) -> Panel:
    """Build the load by expert and step and by expert and layer, and a table of extremes."""
    histories = [_load_history(run) for run in runs]
    if not any(histories):
        absent = "No load was recorded: a dense model, or no step was logged."
        return Panel("experts", "Experts", [absent])
    num_experts = sum(len(pairs[-1][1]) for layers in histories for pairs in layers.values())
    max_steps = min(MAX_STEPS, max(MIN_STEPS, MAX_LOAD_CELLS // num_experts))
    longest = max(len(pairs) for layers in histories for pairs in layers.values())
    thinned = ""
    if longest > max_steps:
        thinned = (
            f" Of {longest:,} logged steps {max_steps} are drawn: the least balanced step of each "
            "stretch."
        )
    run_selector = Selector("Run", [run.name for run in runs])
    layers = [f"layer {layer}" for layer in max(histories, key=len)]
    over_time = Chart(
        "load",
        "Load of each expert over time",
        "Assignments of an expert before any drop, as a multiple of the fair share (the mean over "
        f"the experts of that step). 1 is perfect balance.{thinned}",
        "matrix",
        {
            f"{index}|{position}": _load_view(pairs, max_steps)
            for index, layers in enumerate(histories)
            for position, pairs in enumerate(layers.values())
        },
        {"x": "step", "y": "expert", **LOAD_AXES, "fair": "column"},
        [run_selector, Selector("Layer", layers)],
        wide=True,
    )
    by_layer = Chart(
        "load-last",
        "Load by layer at the last logged step",
        "The same for all layers at once: a row is an MoE layer, a column an expert.",
        "matrix",
        {str(index): _last_view(layers) for index, layers in enumerate(histories) if layers},
        {"x": "expert", "y": "layer", **LOAD_AXES, "fair": "row"},
        [run_selector],
        wide=True,
    )
    extremes = _extreme_loads(runs, histories)
    return Panel("experts", "Experts", charts=[over_time, by_layer], tables=[extremes])


def _load_history(run: Run) -> LoadHistory:
    """Return the loads by layer, without steps whose number of experts is not the last one's.

    A run directory that was used twice contains two models.
    """
    found: LoadHistory = {}
    for line in run.train:
        for layer, row in layers_of(line).items():
            if load := numbers(row.get("load")):
                found.setdefault(layer, []).append((line["step"], load))
    return {
        layer: [pair for pair in pairs if len(pair[1]) == len(pairs[-1][1])]
        for layer, pairs in sorted(found.items())
    }


def _load_view(pairs: Sequence[tuple[int, list[float]]], max_steps: int) -> View:
    """Return the matrix of one layer, expert by step, in counted assignments."""
    kept = most_imbalanced_steps([_max_over_mean(load) for _, load in pairs], max_steps)
    drawn = [pairs[index] for index in kept]
    experts = range(len(drawn[-1][1]))
    return {
        "x": [step for step, _ in drawn],
        "y": list(experts),
        "z": [[round_number(load[expert]) for _, load in drawn] for expert in experts],
    }


def _max_over_mean(load: Sequence[float]) -> float:
    mean = fmean(load)
    return max(load) / mean if mean else 1.0


def _last_view(layers: LoadHistory) -> View:
    """Return the matrix of layer by expert at each layer's last step, rows filled with None."""
    width = max(len(pairs[-1][1]) for pairs in layers.values())
    rows = [[round_number(value) for value in pairs[-1][1]] for pairs in layers.values()]
    filled = [row + [None] * (width - len(row)) for row in rows]
    return {"x": list(range(width)), "y": list(layers), "z": filled}


def _extreme_loads(runs: Sequence[Run], histories: Sequence[LoadHistory]) -> Table:
    rows: list[tuple[float, list[str]]] = []
    for run, layers in zip(runs, histories, strict=True):
        prefix = f"{run.name}, " if len(runs) > 1 else ""
        for layer, pairs in layers.items():
            step, load = pairs[-1]
            cells = [f"{prefix}layer {layer}", f"{step:,}", *_load_cells(load)]
            rows.append((_max_over_mean(load), cells))
    rows.sort(key=lambda row: -row[0])
    order = "the least balanced layer first"
    if len(rows) > MAX_LISTED_LAYERS:
        order = f"the {MAX_LISTED_LAYERS} least balanced of {len(rows)} layers"
    return Table(
        f"Most and least loaded experts at the last logged step, {order}; in brackets the load as "
        "a multiple of the fair share",
        [
            *("Layer", "Step", "Max / mean", "Coefficient of variation", "Without any token"),
            *("Most loaded", "Least loaded"),
        ],
        [cells for _, cells in rows[:MAX_LISTED_LAYERS]],
    )


def _load_cells(load: list[float]) -> list[str]:
    mean = fmean(load) or 1.0
    order = sorted(range(len(load)), key=lambda expert: -load[expert])
    extremes = (order[:NUM_EXTREMES], reversed(order[-NUM_EXTREMES:]))
    return [
        format_number(_max_over_mean(load), 3),
        format_number(pstdev(load) / mean, 3),
        str(load.count(0)),
        *(", ".join(f"{e} ({load[e] / mean:.2f})" for e in experts) for experts in extremes),
    ]


def traffic_panel(runs: Sequence[Run]) -> Panel:
    """Build the rows that each rank sent to each other rank at the last logged step."""
    title = "Exchange between ranks"
    views = [_traffic_views(run) for run in runs]
    chart = Chart(
        "traffic",
        "Rows from rank to rank",
        "A row is the sender, a column the receiver; the diagonal stays on its rank. Forward pass "
        "of the last logged step.",
        "matrix",
        axes={"x": "to rank", "y": "from rank", "z": "rows"},
    )
    built = build_matrix_chart(chart, runs, views)
    if built is None:
        sentence = "Rows between ranks were not recorded in these runs."
        if all(run.start.get("ep", 1) == 1 for run in runs):
            sentence = "Each rank has all experts, so no row is sent."
        return Panel("traffic", title, [sentence])
    sizes = {
        run.name: _row_size(run)
        for run, by_label in zip(runs, views, strict=True)
        if by_label and run.config is not None
    }
    sentences = [f"{name}: a row is {size}" for name, size in sizes.items()]
    if len(set(sizes.values())) == 1:
        sentences = [f"A row is {next(iter(sizes.values()))}"]
    return Panel("traffic", title, sentences, charts=[built])


def _traffic_views(run: Run) -> dict[str, View]:
    """Return the matrices of all layers, after their sum if all have as many ranks."""
    by_layer = _last_matrices(run.train, _traffic_view)
    labelled = _label(by_layer)
    sizes = {len(view["z"]) for view in by_layer.values()}
    if len(by_layer) < 2 or len(sizes) > 1:
        return labelled
    ranks = range(sizes.pop())
    total = [[sum(view["z"][i][j] for view in by_layer.values()) for j in ranks] for i in ranks]
    return {"all layers": {**next(iter(by_layer.values())), "z": total}, **labelled}


def _traffic_view(row: dict[str, Any]) -> View | None:
    rows = matrix(row.get("traffic"))
    if len(rows) < 2 or len(rows[0]) != len(rows):
        return None
    ranks = list(range(len(rows)))
    return {"x": ranks, "y": ranks, "z": [[round_number(value) for value in row] for row in rows]}


def _row_size(run: Run) -> str:
    assert run.config is not None
    precision = str(run.start.get("precision", run.config.train.precision))
    size = f"{run.config.model.dim} numbers"
    if precision in BYTES_PER_NUMBER:
        num_bytes = run.config.model.dim * BYTES_PER_NUMBER[precision]
        size += f" in {precision}, {format_bytes(num_bytes)}"
    return f"{size}, and is sent out and back."


def specialization_panel(runs: Sequence[Run]) -> Panel:
    """Build load by domain, co-selection of experts, and mutual information, from evaluations."""
    domains = Chart(
        "domains",
        "Load by domain",
        "Assignments of each domain's tokens, as a multiple of the fair share within the domain: 1 "
        "everywhere means that the experts do not distinguish the domains. Last evaluation.",
        "matrix",
        axes={"x": "expert", "y": "domain", **LOAD_AXES, "fair": "row"},
    )
    pairs = Chart(
        "co-selection",
        "Co-selection of experts",
        "Number of tokens for which both experts were chosen. Last evaluation.",
        "matrix",
        axes={"x": "expert", "y": "expert", "z": "tokens"},
    )
    information = CurveChart(
        "information",
        "Mutual information of expert and domain",
        "0: the expert is independent of the domain. Mean over the MoE layers.",
        "bits",
        evaluation=layer_mean("mutual_information"),
    )
    by_domain = [_label(_last_matrices(run.evals, _domain_view)) for run in runs]
    by_pair = [_label(_last_matrices(run.evals, _pair_view)) for run in runs]
    charts = {
        "No load by domain was recorded: it needs data with labels.": build_matrix_chart(
            domains, runs, by_domain
        ),
        "Co-selection was not recorded.": build_matrix_chart(pairs, runs, by_pair),
    }
    absent = [sentence for sentence, chart in charts.items() if chart is None]
    found = [*charts.values(), build_curve_chart(information, runs)]
    built = [chart for chart in found if chart is not None]
    return Panel("specialisation", "Specialization", absent, charts=built)


def _last_matrices(
    lines: Sequence[Line], read: Callable[[dict[str, Any]], View | None]
) -> dict[int, View]:
    """Return the view by layer, from the last line that has one."""
    found: dict[int, View] = {}
    for line in lines:
        for layer, row in layers_of(line).items():
            if view := read(row):
                found[layer] = view
    return dict(sorted(found.items()))


def _label(by_layer: dict[int, View]) -> dict[str, View]:
    return {f"layer {layer}": view for layer, view in by_layer.items()}


def _domain_view(row: dict[str, Any]) -> View | None:
    domains = row.get("domains")
    if not isinstance(domains, dict):
        return None
    counts = {str(name): numbers(values) for name, values in domains.items()}
    counts = {name: values for name, values in counts.items() if values}
    if not counts or len({len(values) for values in counts.values()}) > 1:
        return None
    experts = list(range(len(next(iter(counts.values())))))
    rows = [[round_number(value) for value in values] for values in counts.values()]
    return {"x": experts, "y": list(counts), "z": rows}


def _pair_view(row: dict[str, Any]) -> View | None:
    """Return co-selection without the diagonal: it is the load, and larger than all pairs."""
    pairs = matrix(row.get("co_selection"))
    if not pairs or len(pairs[0]) != len(pairs):
        return None
    experts = list(range(len(pairs)))
    counts = [
        [None if i == j else round_number(value) for j, value in enumerate(values)]
        for i, values in enumerate(pairs)
    ]
    return {"x": experts, "y": experts, "z": counts}
