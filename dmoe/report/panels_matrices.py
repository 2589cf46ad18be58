"""Matrices: rows between ranks, which experts are chosen together, and which domains they serve.

Letters: E experts, EP ranks that share the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dmoe.report.figures import overlay
from dmoe.report.format import format_bytes
from dmoe.report.page import Chart, Choice, Panel, short
from dmoe.report.panels_layers import key, mean_of
from dmoe.report.run import Run, layers_of
from dmoe.runs.metrics_log import Line, matrix, numbers

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
CELLS = 250_000
"""Of one kind of matrix over all runs and layers: about 1.5 MB of HTML."""
View = dict[str, Any]


def last_matrices(
    lines: Sequence[Line], read: Callable[[dict[str, Any]], View | None]
) -> dict[int, View]:
    """By layer, the view of the last line that has one."""
    found: dict[int, View] = {}
    for line in lines:
        for layer, row in layers_of(line).items():
            if view := read(row):
                found[layer] = view
    return dict(sorted(found.items()))


def chart(
    id: str,
    title: str,
    caption: str,
    runs: Sequence[Run],
    found: Sequence[dict[str, View]],
    axes: dict[str, str],
) -> Chart | None:
    """`found`: for each run, views by the label of the layer. As many layers are kept as fit the page, and the caption says so."""
    labels = max((list(views) for views in found), key=len, default=[])
    if not labels:
        return None
    cells = max(
        (len(view["z"]) * len(view["z"][0]) for views in found for view in views.values()),
        default=1,
    )
    fitting = max(1, CELLS // (cells * len(runs)))
    if fitting < len(labels):
        caption += f" Of {len(labels)} layers, the first {fitting} are kept in this page."
    shown = labels[:fitting]
    views = {
        f"{index}|{position}": by_label[label]
        for index, by_label in enumerate(found)
        for position, label in enumerate(shown)
        if label in by_label
    }
    return Chart(
        id,
        title,
        caption,
        "matrix",
        views,
        axes,
        [Choice("Run", [run.name for run in runs]), Choice("Layer", shown)],
    )


def labelled(by_layer: dict[int, View]) -> dict[str, View]:
    return {f"layer {layer}": view for layer, view in by_layer.items()}


def traffic(runs: Sequence[Run]) -> Panel:
    """Rows each rank sent to each, at the last logged step."""
    found = [_traffic(run) for run in runs]
    caption = "A row is the sender, a column the receiver; the diagonal stays on its rank. Forward pass of the last logged step."
    axes = {"x": "to rank", "y": "from rank", "z": "rows"}
    item = chart("traffic", "Rows from rank to rank", caption, runs, found, axes)
    if item is None:
        alone = all(run.start.get("ep", 1) == 1 for run in runs)
        why = (
            "One rank holds every expert, so no row travels."
            if alone
            else "Rows between ranks were not recorded in these runs."
        )
        return Panel("traffic", "Exchange between ranks", [why])
    sizes = {
        run.name: _bytes(run)
        for run, views in zip(runs, found, strict=True)
        if views and run.config is not None
    }
    alike = len(set(sizes.values())) < 2
    words = [
        f"A row is {size}" if alike else f"{name}: a row is {size}" for name, size in sizes.items()
    ]
    return Panel("traffic", "Exchange between ranks", list(dict.fromkeys(words)), charts=[item])


def _traffic(run: Run) -> dict[str, View]:
    by_layer = last_matrices(run.train, _traffic_view)
    sizes = {len(view["z"]) for view in by_layer.values()}
    if len(by_layer) < 2 or len(sizes) > 1:
        return labelled(by_layer)
    ranks = range(sizes.pop())
    total = [[sum(view["z"][i][j] for view in by_layer.values()) for j in ranks] for i in ranks]
    first = next(iter(by_layer.values()))
    return {"all layers": {**first, "z": total}, **labelled(by_layer)}


def _traffic_view(row: dict[str, Any]) -> View | None:
    rows = matrix(row.get("traffic"))
    if len(rows) < 2 or len(rows[0]) != len(rows):
        return None
    ranks = list(range(len(rows)))
    return {"x": ranks, "y": ranks, "z": [[short(value) for value in row] for row in rows]}


def _bytes(run: Run) -> str:
    assert run.config is not None
    width, precision = (
        run.config.model.dim,
        str(run.start.get("precision", run.config.train.precision)),
    )
    size = (
        f" in {precision}, {format_bytes(width * WIDTHS[precision])}" if precision in WIDTHS else ""
    )
    return f"{width} numbers{size}, and travels out and back."


def specialisation(runs: Sequence[Run]) -> Panel:
    """Load by domain, experts chosen together, and how much an expert tells of the domain, from the evaluations."""
    domains = chart(
        "domains",
        "Load by domain",
        "Choices of each domain's tokens, as a multiple of the fair share within the domain: 1 everywhere means that the experts do "
        "not tell the domains apart. From the last evaluation.",
        runs,
        [labelled(last_matrices(run.evals, _domain_view)) for run in runs],
        {
            "x": "expert",
            "y": "domain",
            "z": "times the fair share",
            "count": "choices",
            "fair": "row",
        },
    )
    together = chart(
        "co-selection",
        "Experts chosen together",
        "How often two experts were chosen for the same token. From the last evaluation.",
        runs,
        [labelled(last_matrices(run.evals, _pair_view)) for run in runs],
        {"x": "expert", "y": "expert", "z": "tokens"},
    )
    information = overlay(
        "information",
        "Mutual information of expert and domain",
        "0: the expert tells nothing of the domain. Mean over the layers.",
        "bits",
        runs,
        {},
        held_out=mean_of(key("mutual_information")),
    )
    charts = [item for item in (domains, together, information) if item is not None]
    words = [] if domains else ["No load by domain was recorded: it needs data with labels."]
    words += [] if together else ["Which experts are chosen together was not recorded."]
    return Panel("specialisation", "Specialisation", words, charts=charts)


def _domain_view(row: dict[str, Any]) -> View | None:
    domains = row.get("domains")
    if not isinstance(domains, dict):
        return None
    counts = {str(name): numbers(values) for name, values in domains.items()}
    counts = {name: values for name, values in counts.items() if values}
    if not counts or len({len(values) for values in counts.values()}) > 1:
        return None
    width = len(next(iter(counts.values())))
    return {
        "x": list(range(width)),
        "y": list(counts),
        "z": [[short(value) for value in values] for values in counts.values()],
    }


def _pair_view(row: dict[str, Any]) -> View | None:
    pairs = matrix(row.get("co_selection"))
    if not pairs or len(pairs[0]) != len(pairs):
        return None
    experts = list(range(len(pairs)))
    apart = [
        [None if i == j else short(value) for j, value in enumerate(values)]
        for i, values in enumerate(pairs)
    ]
    return {
        "x": experts,
        "y": experts,
        "z": apart,
    }  # an expert with itself is its load, which would drown the pairs
