"""The result of one run as plain text: what it reached and cost, then by domain, by missing stream, by layer.

The trainer prints it at the end of a run, and `dmoe compare --full` from the same lines again. What was not recorded is left out.

The mixture layers of one run at its end, as tables of plain text: which experts are used, and what the token got for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dmoe.report.figures import RunSummary, latest_by_layer, metric_name, summarize
from dmoe.report.format import format_flops, format_number, single_line, text_table
from dmoe.report.run import Record
from dmoe.runs.metrics_log import Line, Metrics, finite, matrix, number, numbers

WIDTH = 100
MOST_DOMAINS = 40
FORMS = {
    "bits_per_byte": ("bits/byte", "{:.4f}"),
    "accuracy": ("accuracy", "{:.2%}"),
    "loss": ("loss", "{:.4f}"),
}
UNCHANGED = "="


def result_lines(metrics: Metrics) -> list[str]:
    """What `dmoe train` prints at the end of a run; nothing of how it ended, so that it is the same before and after the `end` line."""
    record = Record(metrics)
    figures = summarize(record)
    parts = [
        _own_row(figures),
        _domains(record),
        _compositions(record),
        _missing(record),
        *layer_results(record, WIDTH),
    ]
    lines = [f"result after {figures.step:,} steps"]
    for part in parts:
        lines += ["", *part] if part and len(lines) > 1 else part
    return lines


def _own_row(figures: RunSummary) -> list[str]:
    """The run's row of a comparison, one figure a line."""
    unit = figures.unit
    ranks = (
        None
        if figures.world is None
        else f"{format_number(figures.world)}, {format_number(figures.ep)} to a copy of the experts"
    )
    trained = figures.trainable_parameters if figures.partly_trained else None
    cells = {
        "held-out bits/byte": _spelled(figures.bits_per_byte, "{:.4f}"),
        "held-out accuracy": _spelled(figures.accuracy, "{:.2%}"),
        "held-out loss (nats)": _spelled(figures.loss, "{:.4f}"),
        "parameters": _spelled(figures.parameters, "{:,.0f}"),
        f"active parameters a {unit}": _spelled(figures.active_parameters, "{:,.0f}"),
        "trainable parameters": _spelled(trained, "{:,.0f}"),
        f"forward FLOPs a {unit}": None
        if figures.flops_per_token is None
        else format_flops(figures.flops_per_token),
        "training FLOPs in all": None
        if figures.training_flops is None
        else format_flops(figures.training_flops) + (" at most" if trained is not None else ""),
        f"{unit}s trained on": _spelled(figures.tokens, "{:,.0f}"),
        "seconds": _spelled(figures.seconds, "{:,.1f}"),
        f"{unit}s a second": _spelled(figures.tokens_per_second, "{:,.0f}"),
        "dropped choices at the end": _spelled(figures.drop_rate, "{:.2%}"),
        "expert load max/mean at the end": _spelled(figures.load_max_over_mean, "{:.2f}"),
        "ranks": ranks,
    }
    known = {name: cell for name, cell in cells.items() if cell is not None}
    wide = max(map(len, known), default=0)
    return [f"  {name.ljust(wide)}  {cell}" for name, cell in known.items()]


def _spelled(value: float | None, form: str) -> str | None:
    return None if value is None else form.format(value)


def _domains(record: Record) -> list[str]:
    head, rows = domain_rows(record.evals)
    if len(rows) < 2:
        return []
    more = f"  and {len(rows) - MOST_DOMAINS} domains more: dmoe report has them all"
    return [
        "held out, by domain",
        *text_table(head, rows[:MOST_DOMAINS], WIDTH, 2),
        *([more] if len(rows) > MOST_DOMAINS else []),
    ]


def domain_rows(evals: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: each domain of the last evaluation that tells of domains, and what it was at the first such one.

    The change is `=` only where everything stored of the domain is equal to the last bit: that is how a domain shows that nothing it
    depends on was touched. A difference that is too small for the digits is still a difference.
    """
    told = [line for line in evals if _mapping(line.get("by_domain"))]
    if not told:
        return [], []
    first, now = told[0], told[-1]
    found: dict[str, Any] = now["by_domain"]
    measure = metric_name(next(iter(found.values())) if all(map(_mapping, found.values())) else {})
    title, form = FORMS[measure]
    head, compared = ["domain", f"{title}\nat step {now['step']:,}"], first["step"] != now["step"]
    if compared:
        head = [
            "domain",
            f"{title}\nat step {first['step']:,}",
            f"{title}\nat step {now['step']:,}",
            "change",
        ]
    rows = []
    for domain in found:
        value = number(now, "by_domain", domain, measure)
        before = number(first, "by_domain", domain, measure)
        cells = [_spelled(before, form) or "-"] if compared else []
        cells += [_spelled(value, form) or "-"]
        cells += (
            [_change(_mapping(first["by_domain"].get(domain)), _mapping(found[domain]), measure)]
            if compared
            else []
        )
        rows.append([single_line(domain), *cells])
    return head, rows


def _change(before: Line, now: Line, measure: str) -> str:
    old, new = number(before, measure), number(now, measure)
    if old is None or new is None:
        return "-"
    if before == now:
        return UNCHANGED
    form = "{:+.2%}" if measure == "accuracy" else "{:+.4f}"
    said = form.format(new - old)
    small = new != old and not said.strip("+-0.%")
    return f"{new - old:+.1e}" if small else said


def _compositions(record: Record) -> list[str]:
    """Each domain of the last such evaluation with sets of modules: none, one, several."""
    now = next((line for line in reversed(record.evals) if line.get("compositions")), None)
    sets = [entry for entry in now["compositions"] if _mapping(entry)] if now is not None else []
    if not sets:
        return []
    first = _mapping(sets[0].get("by_domain"))
    measure = metric_name(_mapping(next(iter(first.values()), {})))
    title, form = FORMS[measure]
    head = ["domain", *("+".join(map(str, entry.get("modules", []))) or "none" for entry in sets)]
    rows = [
        [
            single_line(domain),
            *(_spelled(number(entry, "by_domain", domain, measure), form) or "-" for entry in sets),
        ]
        for domain in first
    ]
    return [f"{title} by domain, with these modules", *text_table(head, rows, WIDTH, 2)]


def _missing(record: Record) -> list[str]:
    """How well the run does where one of its input streams is not there."""
    now = next((line for line in reversed(record.evals) if _mapping(line.get("missing"))), None)
    if now is None:
        return []
    whole = number(now, "accuracy")
    rows = [["none", _spelled(whole, "{:.2%}") or "-", ""]]
    for stream in now["missing"]:
        value = number(now, "missing", stream)
        change = "" if value is None or whole is None else f"{value - whole:+.2%}"
        rows.append([single_line(stream), _spelled(value, "{:.2%}") or "-", change])
    return [
        "held out, with a stream missing",
        *text_table(["missing", "accuracy", "change"], rows, WIDTH, 2),
    ]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


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
    dropped, cost = (
        latest_by_layer(record.train, "drop_rate"),
        latest_by_layer(record.train, "cost_share"),
    )
    rows = []
    for layer, load in loads.items():
        shares = _shares(load, most) if most <= MOST_EXPERTS else _extremes(load)
        costs = [_percent(cost.get(layer))] if cost else []
        rows.append([str(layer), _percent(dropped.get(layer)), *costs, *shares])
    title = "choices of each expert in percent, last logged step" + (
        " (expert: share)" if most > MOST_EXPERTS else ""
    )
    return [
        title,
        *text_table(["layer", "dropped", *(["cost"] if cost else []), *head], rows, width, 2),
    ]


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
        *text_table(head, rows, width, 2),
        *([f"  correlation of the two: {', '.join(told)}"] if told else []),
    ]


def _k_row(row: list[Any]) -> list[str]:
    return [f"{row[0]:.0f}", f"{row[1]:,.0f}", f"{row[2]:.4f}"]
