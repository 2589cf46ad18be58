"""What a report is made of, before any HTML: panels of sentences, tables and charts. Text in here is plain; `html` escapes all of it.

A chart's `views` hold what is drawn for each combination of what the reader may choose, under the positions joined by `|`: with the
choices Run and Layer, `"0|3"` is the first run's fourth layer. A combination without a view is said to be missing, in words.

Panels as one HTML document. The only place that writes markup, so the only place that has to escape.

Names of runs, alerts and samples come from outside. Every text passes `escape`, the charts' data holds no `<`, and a content security
policy names the scripts by their hash: markup that got through all the same would run nothing, and nothing is loaded from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from typing import Any, Literal

from dmoe import __version__


@dataclass(frozen=True)
class Choice:
    label: str
    options: Sequence[str]


@dataclass(frozen=True)
class Chart:
    id: str
    title: str
    caption: str
    """What it shows and how to read it: this is also its text alternative."""
    kind: Literal["curves", "matrix"]
    views: Mapping[str, Any]
    """Plain JSON; page.js says what each kind reads."""
    axes: Mapping[str, str]
    """`x`, `y` and, for a matrix, `z`: names with units."""
    choices: Sequence[Choice] = ()
    wide: bool = False


@dataclass(frozen=True)
class Table:
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The first cell of a row is its header."""


@dataclass(frozen=True)
class Quote:
    """Text a model or a run wrote, shown as it is."""

    title: str
    text: str


@dataclass(frozen=True)
class Panel:
    id: str
    title: str
    words: Sequence[str] = ()
    lists: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Headed lists of sentences."""
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    quotes: Sequence[Quote] = ()


def short(value: float | None) -> float | None:
    """Six significant digits, an integer where it is one: what a chart can show, in as few bytes."""
    if value is None:
        return None
    rounded = float(f"{value:.6g}")
    return int(rounded) if rounded.is_integer() else rounded


LONG = 20
"""Rows of a table that scrolls in a frame of its own."""


def document(names: Sequence[str], panels: Sequence[Panel], marks: Sequence[Any]) -> str:
    """The whole file. `names`: of the runs; `marks`: of each run, what `event_panels.marks` gives."""
    charts = [chart for panel in panels for chart in panel.charts]
    data = {
        "runs": list(names),
        "marks": list(marks),
        "charts": {chart.id: _chart_data(chart) for chart in charts},
    }
    scripts = [plotly(), _asset("page.js")]
    title = "Report on " + (names[0] if len(names) == 1 else f"{len(names)} runs")
    links = "".join(
        f'<li><a href="#{escape(panel.id)}">{escape(panel.title)}</a></li>' for panel in panels
    )
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">',
            f'<link rel="icon" href="data:,">\n<title>{escape(title)} - dmoe</title>\n<style>{_asset("page.css")}</style>\n</head>',
            f'<body>\n<a class="skip" href="#main">Skip to the content</a>\n<header><p>dmoe {escape(__version__)}</p>'
            f"<h1>{escape(title)}</h1>{_runs(names)}</header>",
            f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main id="main" tabindex="-1">',
            "<noscript><p>The charts need JavaScript. The tables, events and samples do not.</p></noscript>",
            *map(_panel, panels),
            f'</main>\n<script type="application/json" id="report-data">{_embedded(data)}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body>\n</html>\n",
        ]
    )


def plotly() -> str:
    """The plotting library, as its Python package ships it.

    Plotly and not Bokeh, whose script is a quarter of the size: it draws SVG, which prints sharply, and its Python package needs
    two others where Bokeh's needs nine, a web server among them.
    """
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _asset(name: str) -> str:
    return files("dmoe.report").joinpath(name).read_text(encoding="utf-8")


def _policy(scripts: Iterable[str]) -> str:
    for script in scripts:
        assert "</script" not in script.lower(), "a script would end early"
        assert "\r" not in script, "browsers turn it into a line feed, and the hash would not fit"
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'"
        for s in scripts
    )
    rest = "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {hashes}; {rest}"


def _embedded(data: Any) -> str:
    """JSON that cannot end its script element or open a comment."""
    return (
        json.dumps(data, allow_nan=False, separators=(",", ":"))
        .replace("<", "\\u003c")
        .replace(">", "\\u003e")
    )


def _chart_data(chart: Chart) -> dict[str, Any]:
    choices = [{"label": choice.label, "options": list(choice.options)} for choice in chart.choices]
    return {
        "title": chart.title,
        "kind": chart.kind,
        "axes": dict(chart.axes),
        "choices": choices,
        "views": dict(chart.views),
    }


def _runs(names: Sequence[str]) -> str:
    return (
        f"<ul>{''.join(f'<li>{escape(name)}</li>' for name in names)}</ul>"
        if len(names) > 1
        else ""
    )


def _panel(panel: Panel) -> str:
    id = escape(panel.id)
    parts = [f"<p>{escape(sentence)}</p>" for sentence in panel.words]
    if panel.tables:
        parts.append(f'<div class="tables">{"".join(map(_table, panel.tables))}</div>')
    if panel.lists:
        parts.append(
            f'<div class="lists">{"".join(_list(*item) for item in panel.lists.items())}</div>'
        )
    if panel.charts:
        parts.append(f'<div class="charts">{"".join(map(_chart, panel.charts))}</div>')
    parts += [_quote(quote) for quote in panel.quotes]
    return f'<section id="{id}" aria-labelledby="{id}-title"><h2 id="{id}-title">{escape(panel.title)}</h2>{"".join(parts)}</section>'


def _list(heading: str, sentences: Iterable[str]) -> str:
    items = "".join(f"<li>{_strong_start(sentence)}</li>" for sentence in sentences)
    return f"<div><h3>{escape(heading)}</h3><ul>{items}</ul></div>"


def _strong_start(sentence: str) -> str:
    """`Routing: ...` with its first word set off."""
    start, colon, rest = sentence.partition(": ")
    return f"<strong>{escape(start)}:</strong> {escape(rest)}" if colon else escape(sentence)


def _chart(chart: Chart) -> str:
    id, title = f"chart-{escape(chart.id)}", escape(chart.title)
    told = escape(f"{chart.title}. {chart.caption} The numbers are in the table below.", quote=True)
    # The drawing has to stay usable with a mouse, so its name is given by a role that does not hide it from one.
    return (
        f'<figure id="{id}" class="chart {chart.kind}{" wide" if chart.wide else ""}" data-chart="{escape(chart.id)}">'
        f"<figcaption><h3>{title}</h3><p>{escape(chart.caption)}</p></figcaption>{_selects(chart, id)}"
        f'<ul class="legend" aria-label="Curves of {title}; press to hide or show"></ul>'
        f'<div class="plot" role="img" aria-label="{told}"></div><p class="missing" role="status" hidden></p>'
        f'<details><summary>The numbers of this chart as a table</summary><div class="scroll" tabindex="0" role="region" '
        f'aria-label="Numbers of {title}"></div></details></figure>'
    )


def _selects(chart: Chart, id: str) -> str:
    """A native select for each choice that leaves one."""
    parts = []
    for position, choice in enumerate(chart.choices):
        if len(choice.options) > 1:
            options = "".join(
                f'<option value="{index}">{escape(name)}</option>'
                for index, name in enumerate(choice.options)
            )
            parts.append(
                f'<label for="{id}-{position}">{escape(choice.label)} <select id="{id}-{position}" data-choice="{position}">'
            )
            parts.append(f"{options}</select></label>")
    return f'<div class="choices">{"".join(parts)}</div>' if parts else ""


def _table(table: Table) -> str:
    head = "".join(
        f'<th scope="col">{escape(name)}</th>' if name else "<td></td>" for name in table.head
    )
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in table.rows
    )
    label = escape(table.caption, quote=True)
    return (
        f'<div class="scroll{" long" if len(table.rows) > LONG else ""}" tabindex="0" role="region" aria-label="{label}">'
        f"<table><caption><span>{escape(table.caption)}</span></caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _quote(quote: Quote) -> str:
    return f'<h3>{escape(quote.title)}</h3><pre tabindex="0">{escape(quote.text)}</pre>'
