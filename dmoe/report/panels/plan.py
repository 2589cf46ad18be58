"""The panel that grades the plan of a run: predicted against measured.

`dmoe.simulation.grade` computes what a plan predicts of a run; the report only shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dmoe.report.format import format_bytes, format_duration, format_percent
from dmoe.report.page import Panel, Table
from dmoe.report.run import Run

FORMS = {"bytes": format_bytes, "seconds": format_duration, "share": format_percent}


@dataclass(frozen=True)
class Quantity:
    """One quantity of a run, as planned and as measured."""

    name: str
    unit: str
    """A key of `FORMS`."""
    predicted: float | None = None
    measured: float | None = None
    problem: str = ""
    """Why the two are not compared."""

    @property
    def error(self) -> float | None:
        """The prediction over what was measured, minus 1; None where it has no meaning."""
        if self.problem or self.predicted is None or not self.measured or self.unit == "share":
            return None
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Grade:
    """What a plan of a run's own config says of the run."""

    source: str
    """Cluster and load of the plan; or why there is no plan."""
    quantities: Sequence[Quantity] = field(default_factory=list)


def plan_panel(runs: Sequence[Run], grades: Mapping[str, Grade]) -> Panel:
    """Build the table of predicted against measured, by run; without grades say who makes them."""
    if not grades:
        return Panel(
            "plan",
            "Predicted against measured",
            ["Not computed while a run trains: dmoe report RUN compares the run with its plan."],
            gist="see dmoe report",
        )
    tables, sentences = list[Table](), list[str]()
    for run in runs:
        grade = grades[run.name]
        sentences.append(f"{run.name}: {grade.source}")
        rows = [_row(quantity) for quantity in grade.quantities if not quantity.problem]
        sentences += [f"{q.name}, not compared: {q.problem}" for q in grade.quantities if q.problem]
        if rows:
            head = ["", "predicted", "measured", "error"]
            tables.append(Table(f"Plan of {run.name}", head, rows))
    return Panel("plan", "Predicted against measured", sentences, tables=tables)


def _row(quantity: Quantity) -> list[str]:
    form, error = FORMS[quantity.unit], quantity.error
    shown = "" if error is None else f"{error:+.1%}"
    if quantity.unit == "share":
        assert quantity.predicted is not None
        assert quantity.measured is not None
        shown = f"{100 * (quantity.predicted - quantity.measured):+.2g} points"
    return [quantity.name, form(quantity.predicted), form(quantity.measured), shown]
