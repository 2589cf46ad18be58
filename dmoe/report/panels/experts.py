"""Panels of matrices: rows between ranks, co-selection of experts, and load by domain.

Letters: E experts, L MoE layers, EP ranks that share the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dmoe.report.charts import (
    CurveChart,
    View,
    build_curve_chart,
    build_matrix_chart,
    describe_constant,
    layer_mean,
)
from dmoe.report.format import BYTES_PER_NUMBER, format_bytes
from dmoe.report.page import Chart, Panel, round_number
from dmoe.report.panels.load import LOAD_AXES
from dmoe.report.run import Run, layers_of
from dmoe.runs.metrics_log import Line, matrix, numbers

EXPECTED = "times the expectation"


def traffic_panel(runs: Sequence[Run]) -> Panel:
    """Build the rows that each rank sent to each other rank at the last logged step."""
    title = "Exchange between ranks"
    views = [_traffic_views(run) for run in runs]
    chart = Chart(
        "traffic",
        "Rows from rank to rank",
        "A row is the sender, a column the receiver; the diagonal stays on its rank. The colour "
        "compares with what all that the two ranks send and receive would give. Forward pass of "
        "the last logged step.",
        "matrix",
        axes={
            **{"x": "to rank", "y": "from rank", "z": EXPECTED, "count": "rows"},
            "fair": "margins",
        },
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
        "Tokens for which both experts were chosen. The colour compares with what the loads of the "
        "two experts alone would give. Last evaluation.",
        "matrix",
        axes={"x": "expert", "y": "expert", "z": EXPECTED, "count": "tokens", "fair": "pairs"},
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
    constant = [describe_constant(chart) if chart.kind == "curves" else None for chart in built]
    drawn = [chart for chart, text in zip(built, constant, strict=True) if text is None]
    remarks = [text for text in constant if text is not None]
    return Panel("specialization", "Specialization", absent, charts=drawn, constant=remarks)


def _last_matrices(
    lines: Sequence[Line], read: Callable[[dict[str, Any]], View | None]
) -> dict[int, View]:
    """Return the view by layer, from the last line that has one."""
    found: dict[int, View] = {}
    for line in reversed(lines):
        for layer, row in layers_of(line).items():
            if layer not in found and (view := read(row)):
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
    loads = [round_number(pairs[expert][expert]) for expert in experts]
    return {"x": experts, "y": experts, "z": counts, "loads": loads}
