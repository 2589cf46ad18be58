"""The first screen: what the run was, how it went in a sentence and five numbers, loss and load.

Several runs have a table in place of the five numbers: the settings that differ, then the results
with the best value of each marked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dmoe.report.format import (
    format_count,
    format_duration,
    format_number,
    format_percent,
    format_utc,
    plural,
)
from dmoe.report.page import Chart, Overview, State, Table, Tile
from dmoe.report.quality import quality_chart
from dmoe.report.run import (
    Run,
    describe_end,
    differing_settings,
    is_finished,
    last_number,
    metric_name,
    summarize,
)
from dmoe.runs.metrics_log import number

BALANCED = 2.0
"""A run is called balanced while no expert has more than this multiple of the mean load."""
MANY_DROPS = 0.05
"""Drop rate of a tile with a warning."""
METRICS: dict[str, tuple[str, Callable[[float], str]]] = {
    "bits_per_byte": ("Validation bits per byte", "{:.3f}".format),
    "accuracy": ("Validation accuracy", format_percent),
    "loss": ("Validation loss", "{:.3f}".format),
}
ABSENT = "-"


def build_overview(runs: Sequence[Run], load: Sequence[Chart]) -> Overview:
    """Build the first screen.

    Args:
        runs: the runs.
        load: the chart of the load of each expert, if there is one.
    """
    quality = quality_chart(runs)
    charts = [*([quality] if quality else []), *load]
    if len(runs) > 1:
        title = f"{len(runs)} runs compared"
        tables = [compare_runs(runs)]
        return Overview(title, _common_facts(runs), _compare_in_words(runs), (), tables, charts)
    (run,) = runs
    return Overview(run.name, facts(run), describe_run(run), tiles(run), (), charts)


def facts(run: Run) -> dict[str, str]:
    """Return date, command, commit, machine and data, as far as recorded."""
    start, summary = run.start, summarize(run)
    times = [time for line in run.metrics.lines if (time := number(line, "time")) is not None]
    found: dict[str, str | None] = {"Began": format_utc(min(times)) + " UTC" if times else None}
    if summary.seconds:
        found["Trained for"] = format_duration(summary.seconds)
    found["Command"] = _text(start.get("command"))
    found["Commit"] = describe_commit(run)
    found["Machine"] = _text(start.get("machine"))
    if summary.world is not None:
        ranks = plural(int(summary.world), "rank")
        found["Ranks"] = f"{ranks}, expert-parallel size {format_number(summary.ep)}"
    if run.config is not None:
        fingerprint = f" (fingerprint {summary.data[:12]})" if summary.data else ""
        found["Data"] = f"{run.config.data.source}{fingerprint}"
    return {name: text for name, text in found.items() if text}


def _common_facts(runs: Sequence[Run]) -> dict[str, str]:
    """Return the facts that all runs share, after their names."""
    each = [facts(run) for run in runs]
    common = {
        name: text
        for name, text in each[0].items()
        if all(other.get(name) == text for other in each)
    }
    return {"Runs": ", ".join(run.name for run in runs), **common}


def describe_commit(run: Run) -> str | None:
    """Return the short commit, and whether files differed from it."""
    commit = run.start.get("commit")
    if not isinstance(commit, str):
        return None
    return commit[:12] + (", with changes that are not committed" if run.start.get("dirty") else "")


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def describe_run(run: Run) -> str:
    """Say in one sentence how the run went."""
    end = describe_end(run)
    parts = [end[0].upper() + end[1:]]
    if run.evals:
        name = metric_name(run.evals[-1])
        value = last_number(run.evals, name)
        if value is not None:
            title, form = METRICS[name]
            unit = title.removeprefix("Validation ")
            parts[0] += f" with a validation {unit} of {form(value)}"
            if name == "bits_per_byte":
                parts[0] = parts[0].replace("a validation bits per byte of ", "")
                parts[0] += " validation bits per byte"
    return f"{'; '.join([*parts, *_balance_clauses(run), _alert_clause(run)])}."


def _balance_clauses(run: Run) -> list[str]:
    drops, largest = summarize(run).drop_rate, summarize(run).load_max_over_mean
    if drops is None and largest is None:
        return ["a dense model"] if run.train and not largest else []
    clauses = []
    since = balanced_since(run)
    if since is not None:
        clauses.append(
            f"balanced from step {since:,} on (no expert above {BALANCED:g} times the mean load)"
        )
    elif largest is not None:
        clauses.append(f"not balanced: the busiest expert has {largest:.3g} times the mean load")
    if drops is not None:
        clauses.append(f"{format_percent(drops)} dropped" if drops else "nothing dropped")
    return clauses


def balanced_since(run: Run) -> int | None:
    """Return the first logged step from which on the run is balanced to its end; None if it ends
    unbalanced."""
    since = None
    for line in reversed(run.train):
        largest = number(line, "load_max_over_mean")
        if largest is None or largest > BALANCED:
            break
        since = line["step"]
    return since


def count_alerts(run: Run) -> int:
    """Return the number of alerts; notes do not count, void ones do, since they did happen."""
    lines = (*run.metrics.lines, *run.metrics.void)
    return sum(line["event"] == "alert" and "title" in line for line in lines)


def _alert_clause(run: Run) -> str:
    alerts = count_alerts(run)
    return plural(alerts, "alert") if alerts else "no alert"


def tiles(run: Run) -> list[Tile]:
    """Return the five numbers: validation, speed, balance, drops, alerts."""
    return [_validation_tile(run), _speed_tile(run), *_load_tiles(run), _alert_tile(run)]


def _validation_tile(run: Run) -> Tile:
    name = metric_name(run.evals[-1]) if run.evals else "bits_per_byte"
    title, form = METRICS[name]
    known = [
        (value, line["step"]) for line in run.evals if (value := number(line, name)) is not None
    ]
    if not known:
        return Tile(title, ABSENT, "no evaluation was recorded")
    last, _ = known[-1]
    best, step = (max if name == "accuracy" else min)(known, key=lambda pair: pair[0])
    if best != last:
        return Tile(title, form(last), f"best {form(best)} at step {step:,}")
    training = last_number(run.train, name)
    detail = "the best of the run" if len(known) > 1 else ""
    if training is not None:
        detail += f"{'; ' if detail else ''}training {form(training)}"
    return Tile(title, form(last), detail)


def _speed_tile(run: Run) -> Tile:
    summary = summarize(run)
    title = f"{summary.unit.capitalize()}s per second"
    if summary.tokens_per_second is None:
        return Tile(title, ABSENT, "not recorded")
    mfu = last_number(run.train, "mfu")
    detail = "median" if mfu is None else f"median; {format_percent(mfu)} of the peak FLOPs"
    return Tile(title, format_count(summary.tokens_per_second), detail)


def _load_tiles(run: Run) -> list[Tile]:
    summary = summarize(run)
    if summary.load_max_over_mean is None:
        return [Tile("Balance", ABSENT, "no MoE layer"), Tile("Drops", ABSENT, "no MoE layer")]
    since = balanced_since(run)
    detail = "busiest expert over the mean, at the last step"
    if since is not None:
        detail = f"busiest expert over the mean; at most {BALANCED:g} from step {since:,} on"
    balance = Tile(
        "Balance",
        f"{summary.load_max_over_mean:.3g}",
        detail,
        "good" if since is not None else "warn",
    )
    if summary.drop_rate is None:
        return [balance, Tile("Drops", ABSENT, "not recorded")]
    rates = [
        (rate, line["step"])
        for line in run.train
        if (rate := number(line, "drop_rate")) is not None
    ]
    most, step = max(rates, key=lambda pair: pair[0])
    detail = f"most {format_percent(most)} at step {step:,}" if most else "in every logged step"
    state: State = "good" if not most else "warn" if summary.drop_rate > MANY_DROPS else ""
    return [balance, Tile("Drops", format_percent(summary.drop_rate), detail, state)]


def _alert_tile(run: Run) -> Tile:
    lines = (*run.metrics.lines, *run.metrics.void)
    alerts = [line for line in lines if line["event"] == "alert" and "title" in line]
    # "expert collapse: layer 3 ...; this usually helps: ...": what comes before the details
    titles = [str(line.get("text", line["title"])).partition(":")[0] for line in alerts]
    distinct = ", ".join(dict.fromkeys(titles))
    detail = distinct if len(distinct) < 80 else f"{distinct[:77]}..."
    return Tile("Alerts", str(len(titles)), detail or "none", "warn" if titles else "good")


Result = tuple[str, Callable[[Run], float | None], Callable[[float], str], int]
"""Title, value, its format, and 1 if more is better, -1 if less is, 0 if neither."""
RESULTS: tuple[Result, ...] = (
    ("Validation bits per byte", lambda run: summarize(run).bits_per_byte, "{:.4f}".format, -1),
    ("Validation accuracy", lambda run: summarize(run).accuracy, "{:.2%}".format, 1),
    ("Validation loss", lambda run: summarize(run).loss, "{:.4f}".format, -1),
    ("Tokens per second", lambda run: summarize(run).tokens_per_second, format_count, 1),
    ("Balance (max / mean)", lambda run: summarize(run).load_max_over_mean, "{:.3g}".format, -1),
    ("Drops", lambda run: summarize(run).drop_rate, format_percent, -1),
    ("Alerts", lambda run: float(count_alerts(run)), "{:.0f}".format, -1),
    ("Parameters", lambda run: summarize(run).parameters, format_count, 0),
    ("Active per token", lambda run: summarize(run).active_parameters, format_count, 0),
    ("Training FLOPs", lambda run: summarize(run).training_flops, format_count, 0),
    ("Trained for", lambda run: summarize(run).seconds, format_duration, 0),
)


def compare_runs(runs: Sequence[Run]) -> Table:
    """Return the settings that differ, then the results with the best value of each marked."""
    rows = [list(row) for row in differing_settings(runs)]
    best = set()
    for title, read, form, better in RESULTS:
        values = [read(run) for run in runs]
        if all(value is None for value in values):
            continue
        known = {value for value in values if value is not None}
        if better and len(known) > 1:
            target = max(known) if better > 0 else min(known)
            best |= {(len(rows), i) for i, value in enumerate(values, 1) if value == target}
        rows.append([title, *(ABSENT if value is None else form(value) for value in values)])
    head = ["", *(run.name + ("" if is_finished(run) else " *") for run in runs)]
    star = "" if all(map(is_finished, runs)) else "; * not finished"
    caption = f"Settings that differ, and results{star}"
    return Table(caption, head, rows, frozenset(best))


def _compare_in_words(runs: Sequence[Run]) -> str:
    """Name the run with the best validation metric, or those that share it."""
    metrics = {metric_name(run.evals[-1]) for run in runs if run.evals}
    if len(metrics) != 1:
        return "The runs have no validation metric in common."
    (name,) = metrics
    known = [(value, run) for run in runs if (value := last_number(run.evals, name)) is not None]
    if not known:
        return "No run has a validation metric."
    value = (max if name == "accuracy" else min)(value for value, _ in known)
    winners = [run.name for found, run in known if found == value]
    title, form = METRICS[name]
    data = {summarize(run).data for run in runs}
    caution = "; the runs were not evaluated on the same data" if len(data) > 1 else ""
    verb = "has" if len(winners) == 1 else "have"
    metric = title[0].lower() + title[1:]
    return f"{', '.join(winners)} {verb} the best {metric}: {form(value)}{caution}."
