"""The mixture layers of one run at its end, as tables of plain text: which experts are used, and what the token got for it."""

from __future__ import annotations

from typing import Any

from dmoe.report.figures import latest_by_layer
from dmoe.report.metrics import finite, matrix, numbers
from dmoe.report.run import Record
from dmoe.report.text_table import table_lines

__all__ = ["layer_results"]

MOST_EXPERTS = 16
"""Above this only the busiest and the least used are told."""
EXTREMES = 3


def layer_results(record: Record, width: int) -> list[list[str]]:
    """Tables of use and cost, and of experts a token; one that has nothing to say is empty."""
    return [_use(record, width), _adaptive(record, width)]


def _use(record: Record, width: int) -> list[str]:
    """`cost`: what a token's experts take of what all of them would, which is what a budget limits."""
    found = latest_by_layer(record.train, "load")
    loads = {layer: numbers(load) for layer, load in found.items() if sum(numbers(load)) > 0}
    if not loads:
        return []
    most = max(map(len, loads.values()))
    head = [*map(str, range(most))] if most <= MOST_EXPERTS else ["busiest", "least used", "unused"]
    dropped, cost = latest_by_layer(record.train, "drop_rate"), latest_by_layer(record.train, "cost_share")
    rows = []
    for layer, load in loads.items():
        shares = _shares(load, most) if most <= MOST_EXPERTS else _extremes(load)
        costs = [_percent(cost.get(layer))] if cost else []
        rows.append([str(layer), _percent(dropped.get(layer)), *costs, *shares])
    title = "choices of each expert in percent, last logged step" + (" (expert: share)" if most > MOST_EXPERTS else "")
    return [title, *table_lines(["layer", "dropped", *(["cost"] if cost else []), *head], rows, width, 2)]


def _percent(value: Any) -> str:
    share = finite(value)
    return "-" if share is None else f"{share:.1%}"


def _shares(load: list[float], most: int) -> list[str]:
    return [f"{100 * count / sum(load):.1f}" for count in load] + [""] * (most - len(load))


def _extremes(load: list[float]) -> list[str]:
    """The busiest experts, the least used ones, and how many nobody chose."""
    order = sorted(range(len(load)), key=lambda expert: (-load[expert], expert))

    def named(experts: list[int]) -> str:
        return ", ".join(f"{expert}: {100 * load[expert] / sum(load):.2f}" for expert in experts)

    return [named(order[:EXTREMES]), named(order[: -EXTREMES - 1 : -1]), str(load.count(0))]


def _adaptive(record: Record, width: int) -> list[str]:
    """Whether hard tokens get more experts: the mean loss of those that used so many."""
    rows = []
    for layer, found in latest_by_layer(record.evals, "k_loss").items():
        rows += [[str(layer), *_k_row(row)] for row in matrix(found) if len(row) == 3]
    if not rows:
        return []
    head = ["layer", "experts used", "tokens", "mean loss (nats)"]
    found = latest_by_layer(record.evals, "k_loss_correlation").items()
    told = [f"layer {layer} {value:+.3f}" for layer, value in found if finite(value) is not None]
    return [
        "experts a token used, and how hard it was (held out)",
        *table_lines(head, rows, width, 2),
        *([f"  correlation of the two: {', '.join(told)}"] if told else []),
    ]


def _k_row(row: list[Any]) -> list[str]:
    return [f"{row[0]:.0f}", f"{row[1]:,.0f}", f"{row[2]:.4f}"]
