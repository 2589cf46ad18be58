"""Results of one run as plain text: quality and cost, then by domain, input stream and MoE layer.

The trainer prints them at the end of a run, and `dmoe compare --full` prints them again from the
same lines. Quantities that were not recorded are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dmoe.report.data_time import data_share
from dmoe.report.format import (
    format_flops,
    format_number,
    format_optional,
    single_line,
    text_table,
)
from dmoe.report.run import (
    Record,
    RunSummary,
    as_dict,
    latest_by_layer,
    metric_name,
    summarize,
)
from dmoe.runs.metrics_log import Line, Metrics, finite, matrix, number, numbers

WIDTH = 100
MAX_DOMAINS = 40
MAX_EXPERT_COLUMNS = 16
"""With more experts, only the most and the least loaded are listed."""
NUM_EXTREMES = 3
METRIC_FORMATS = {
    "bits_per_byte": ("bits/byte", "{:.4f}"),
    "accuracy": ("accuracy", "{:.2%}"),
    "loss": ("loss", "{:.4f}"),
}
UNCHANGED = "="
ABSENT = "-"


def result_lines(metrics: Metrics) -> list[str]:
    """Return the lines that `dmoe train` prints at the end of a run.

    They do not depend on the `end` line, so they are equal before and after it is written.
    """
    record = Record(metrics)
    summary = summarize(record)
    parts = [
        _summary_lines(summary, data_share(record.train)),
        _domain_lines(record),
        _composition_lines(record),
        _missing_stream_lines(record),
        _load_lines(record),
        _variable_k_lines(record),
    ]
    lines = [f"result after {summary.step:,} steps"]
    for part in parts:
        lines += ["", *part] if part and len(lines) > 1 else part
    return lines


def _summary_lines(summary: RunSummary, data_time: float | None) -> list[str]:
    """Return the run's row of a comparison, one quantity per line, and the time for data."""
    unit = summary.unit
    trained = summary.trainable_parameters if summary.partly_trained else None
    flops = training_flops = ranks = None
    if summary.flops_per_token is not None:
        flops = format_flops(summary.flops_per_token)
    if summary.training_flops is not None:
        bound = " at most" if trained is not None else ""
        training_flops = format_flops(summary.training_flops) + bound
    if summary.world is not None:
        ep = format_number(summary.ep)
        ranks = f"{format_number(summary.world)}, expert-parallel size {ep}"
    cells = {
        "validation bits/byte": format_optional(summary.bits_per_byte, "{:.4f}"),
        "validation accuracy": format_optional(summary.accuracy, "{:.2%}"),
        "validation loss (nats)": format_optional(summary.loss, "{:.4f}"),
        "parameters": format_optional(summary.parameters, "{:,.0f}"),
        f"active parameters per {unit}": format_optional(summary.active_parameters, "{:,.0f}"),
        "trainable parameters": format_optional(trained, "{:,.0f}"),
        f"forward FLOPs per {unit}": flops,
        "training FLOPs in total": training_flops,
        f"training {unit}s": format_optional(summary.tokens, "{:,.0f}"),
        "seconds": format_optional(summary.seconds, "{:,.1f}"),
        f"{unit}s per second": format_optional(summary.tokens_per_second, "{:,.0f}"),
        "step time for data": format_optional(data_time, "{:.2%}"),
        "final drop rate": format_optional(summary.drop_rate, "{:.2%}"),
        "final expert load max/mean": format_optional(summary.load_max_over_mean, "{:.2f}"),
        "ranks": ranks,
    }
    known = {name: cell for name, cell in cells.items() if cell is not None}
    width = max(map(len, known), default=0)
    return [f"  {name.ljust(width)}  {cell}" for name, cell in known.items()]


def _domain_lines(record: Record) -> list[str]:
    head, rows = domain_rows(record.evals)
    if len(rows) < 2:
        return []
    lines = ["validation, by domain", *text_table(head, rows[:MAX_DOMAINS], WIDTH, 2)]
    if len(rows) > MAX_DOMAINS:
        lines.append(f"  and {len(rows) - MAX_DOMAINS} more domains, all in dmoe report")
    return lines


def domain_rows(evals: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Compare the first and the last evaluation with domains, one row per domain.

    The change is `=` only if all stored values of the domain are equal to the last bit, which shows
    that nothing the domain depends on was changed. Any other difference is printed, however small.

    Returns:
        The column titles, and the rows; both empty without domains.
    """
    with_domains = [line for line in evals if as_dict(line.get("by_domain"))]
    if not with_domains:
        return [], []
    first, last = with_domains[0], with_domains[-1]
    domains: dict[str, Any] = last["by_domain"]
    is_valid = all(map(as_dict, domains.values()))
    metric = metric_name(next(iter(domains.values())) if is_valid else {})
    title, template = METRIC_FORMATS[metric]
    steps = [first["step"], last["step"]] if first["step"] != last["step"] else [last["step"]]
    head = ["domain", *(f"{title}\nat step {step:,}" for step in steps)]
    if len(steps) == 1:
        return head, [
            [single_line(domain), _metric_cell(last, domain, metric, template)]
            for domain in domains
        ]
    rows = []
    for domain in domains:
        cells = [_metric_cell(line, domain, metric, template) for line in (first, last)]
        before, after = (as_dict(line["by_domain"].get(domain)) for line in (first, last))
        rows.append([single_line(domain), *cells, _change(before, after, metric)])
    return [*head, "change"], rows


def _metric_cell(line: Line, domain: str, metric: str, template: str) -> str:
    return format_optional(number(line, "by_domain", domain, metric), template) or ABSENT


def _change(before: Line, after: Line, metric: str) -> str:
    old, new = number(before, metric), number(after, metric)
    if old is None or new is None:
        return ABSENT
    if before == after:
        return UNCHANGED
    text = f"{new - old:+.2%}" if metric == "accuracy" else f"{new - old:+.4f}"
    rounds_to_zero = not text.strip("+-0.%")
    return f"{new - old:+.1e}" if new != old and rounds_to_zero else text


def _composition_lines(record: Record) -> list[str]:
    """Return the metric per domain and set of modules, from the last evaluation that has them."""
    last = next((line for line in reversed(record.evals) if line.get("compositions")), None)
    entries = [entry for entry in last["compositions"] if as_dict(entry)] if last else []
    if not entries:
        return []
    domains = as_dict(entries[0].get("by_domain"))
    metric = metric_name(as_dict(next(iter(domains.values()), {})))
    title, template = METRIC_FORMATS[metric]
    sets = ["+".join(map(str, entry.get("modules", []))) or "none" for entry in entries]
    rows = [
        [single_line(domain), *(_metric_cell(e, domain, metric, template) for e in entries)]
        for domain in domains
    ]
    head = f"{title} by domain, with these modules"
    return [head, *text_table(["domain", *sets], rows, WIDTH, 2)]


def _missing_stream_lines(record: Record) -> list[str]:
    """Return the accuracy without each input stream, from the last evaluation that has it."""
    lines = (line for line in reversed(record.evals) if as_dict(line.get("missing")))
    last = next(lines, None)
    if last is None:
        return []
    complete = number(last, "accuracy")
    rows = [["none", format_optional(complete, "{:.2%}") or ABSENT, ""]]
    for stream in last["missing"]:
        accuracy = number(last, "missing", stream)
        change = ""
        if accuracy is not None and complete is not None:
            change = f"{accuracy - complete:+.2%}"
        rows.append([single_line(stream), format_optional(accuracy, "{:.2%}") or ABSENT, change])
    head = ["missing", "accuracy", "change"]
    return ["validation, with a stream missing", *text_table(head, rows, WIDTH, 2)]


def _load_lines(record: Record) -> list[str]:
    """Return drop rate, cost share and expert loads per MoE layer.

    The cost share is the cost of a token's experts over that of all experts, which a budget limits.
    """
    found = latest_by_layer(record.train, "load")
    loads = {layer: numbers(load) for layer, load in found.items() if sum(numbers(load)) > 0}
    if not loads:
        return []
    most = max(map(len, loads.values()))
    each_expert = most <= MAX_EXPERT_COLUMNS
    drop_rates = latest_by_layer(record.train, "drop_rate")
    cost_shares = latest_by_layer(record.train, "cost_share")
    head = ["layer", "dropped"] + (["cost"] if cost_shares else [])
    head += map(str, range(most)) if each_expert else ["most loaded", "least loaded", "unused"]
    rows = []
    for layer, load in loads.items():
        cells = [str(layer), _percent_cell(drop_rates.get(layer))]
        if cost_shares:
            cells.append(_percent_cell(cost_shares.get(layer)))
        cells += _load_shares(load, most) if each_expert else _extreme_loads(load)
        rows.append(cells)
    title = "share of assignments per expert in percent, last logged step"
    if not each_expert:
        title += " (expert: share)"
    return [title, *text_table(head, rows, WIDTH, 2)]


def _percent_cell(value: Any) -> str:
    return format_optional(finite(value), "{:.1%}") or ABSENT


def _load_shares(load: list[float], columns: int) -> list[str]:
    shares = [f"{100 * count / sum(load):.1f}" for count in load]
    return shares + [""] * (columns - len(load))


def _extreme_loads(load: list[float]) -> list[str]:
    """Return the most and the least loaded experts, and the number of unused ones."""
    order = sorted(range(len(load)), key=lambda expert: (-load[expert], expert))

    def shares(experts: list[int]) -> str:
        return ", ".join(f"{expert}: {100 * load[expert] / sum(load):.2f}" for expert in experts)

    most, least = order[:NUM_EXTREMES], order[: -NUM_EXTREMES - 1 : -1]
    return [shares(most), shares(least), str(load.count(0))]


def _variable_k_lines(record: Record) -> list[str]:
    """Return the mean loss by number of experts per token, and their correlation, per layer."""
    rows = []
    for layer, found in latest_by_layer(record.evals, "k_loss").items():
        rows += [
            [str(layer), f"{row[0]:.0f}", f"{row[1]:,.0f}", f"{row[2]:.4f}"]
            for row in matrix(found)
            if len(row) == 3
        ]
    if not rows:
        return []
    head = ["layer", "experts used", "tokens", "mean loss (nats)"]
    title = "experts per token and loss of the token (validation)"
    lines = [title, *text_table(head, rows, WIDTH, 2)]
    found = latest_by_layer(record.evals, "k_loss_correlation").items()
    known = [f"layer {layer} {value:+.3f}" for layer, value in found if finite(value) is not None]
    if known:
        lines.append(f"  correlation of the two: {', '.join(known)}")
    return lines
