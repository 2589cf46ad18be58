"""The report page: panels of sentences, tables and charts, rendered as one HTML document.

Text in panels is plain. This is the only module that writes markup, so the only one that escapes.

Names of runs, alerts and text samples come from outside. Every text passes `escape`, the data of
the charts contains no `<`, and a content security policy allows only the scripts with the listed
hashes: markup that is not escaped by mistake still runs nothing, and nothing is loaded.
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

SCROLL_ROWS = 20
"""Tables with more rows scroll in a frame of their own."""


@dataclass(frozen=True)
class Selector:
    """A choice of the reader, for example of a run or a layer."""

    label: str
    options: Sequence[str]


@dataclass(frozen=True)
class Chart:
    """A chart with one view per combination of its selectors."""

    id: str
    title: str
    caption: str
    """Content and how to read it; also the text alternative."""
    kind: Literal["curves", "matrix"]
    views: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON by the selected positions joined by `|`: with selectors for run and layer, `0|3`
    is the fourth layer of the first run. A missing combination is reported in words."""
    axes: Mapping[str, str] = field(default_factory=dict)
    """`x`, `y` and, for a matrix, `z`: names with units."""
    selectors: Sequence[Selector] = ()
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first cell per row is the row's header."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class TextBlock:
    """Preformatted text that a model or a run wrote."""

    title: str
    text: str


@dataclass(frozen=True)
class Panel:
    """One section of the page."""

    id: str
    title: str
    sentences: Sequence[str] = ()
    lists: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Lists of sentences by heading."""
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    texts: Sequence[TextBlock] = ()


def round_number(value: float | None) -> float | None:
    """Round to six significant digits, as an int if it is one: enough for a chart, few bytes."""
    if value is None:
        return None
    rounded = float(f"{value:.6g}")
    return int(rounded) if rounded.is_integer() else rounded


def render_page(names: Sequence[str], panels: Sequence[Panel], marks: Sequence[Any]) -> str:
    """Render the whole file.

    Args:
        names: names of the runs.
        panels: sections in order.
        marks: per run, the events that curves show (`panels_summary.event_marks`).
    """
    charts = [chart for panel in panels for chart in panel.charts]
    data = {
        "runs": list(names),
        "marks": list(marks),
        "charts": {chart.id: _chart_data(chart) for chart in charts},
    }
    scripts = [plotly_script(), _read_asset("page.js")]
    title = escape("Report on " + (names[0] if len(names) == 1 else f"{len(names)} runs"))
    links = "".join(
        f'<li><a href="#{escape(panel.id)}">{escape(panel.title)}</a></li>' for panel in panels
    )
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_security_policy(scripts)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f'<link rel="icon" href="data:,">\n<title>{title} - dmoe</title>',
            f"<style>{_read_asset('page.css')}</style>\n</head>",
            '<body>\n<a class="skip" href="#main">Skip to the content</a>',
            f"<header><p>dmoe {escape(__version__)}</p><h1>{title}</h1>{_run_list(names)}</header>",
            f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main id="main" tabindex="-1">',
            "<noscript><p>The charts need JavaScript. The tables, events and samples do not."
            "</p></noscript>",
            *map(_panel, panels),
            "</main>",
            f'<script type="application/json" id="report-data">{_json_for_script(data)}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body>\n</html>\n",
        ]
    )


def plotly_script() -> str:
    """Return the plotting library from its Python package.

    Plotly and not Bokeh, whose script has a quarter of the size: Plotly draws SVG, which prints
    sharply, and its Python package needs two others; Bokeh's needs nine, with a web server.
    """
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _read_asset(name: str) -> str:
    return files("dmoe.report").joinpath(name).read_text(encoding="utf-8")


def _security_policy(scripts: Iterable[str]) -> str:
    hashes = []
    for script in scripts:
        assert "</script" not in script.lower(), "would end the script element early"
        assert "\r" not in script, "browsers replace it by a line feed, which changes the hash"
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        hashes.append(f"'sha256-{digest}'")
    rest = "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {' '.join(hashes)}; {rest}"


def _json_for_script(data: Any) -> str:
    """Return JSON that cannot end its script element or open a comment."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e")


def _chart_data(chart: Chart) -> dict[str, Any]:
    return {
        "title": chart.title,
        "kind": chart.kind,
        "axes": dict(chart.axes),
        "choices": [{"label": s.label, "options": list(s.options)} for s in chart.selectors],
        "views": dict(chart.views),
    }


def _run_list(names: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(name)}</li>" for name in names)
    return f"<ul>{items}</ul>" if len(names) > 1 else ""


def _panel(panel: Panel) -> str:
    id = escape(panel.id)
    parts = [f"<p>{escape(sentence)}</p>" for sentence in panel.sentences]
    groups = {
        "tables": map(_table, panel.tables),
        "lists": (_list(*item) for item in panel.lists.items()),
        "charts": map(_chart, panel.charts),
    }
    for name, rendered in groups.items():
        if content := "".join(rendered):
            parts.append(f'<div class="{name}">{content}</div>')
    parts += [_text_block(block) for block in panel.texts]
    heading = f'<h2 id="{id}-title">{escape(panel.title)}</h2>'
    return f'<section id="{id}" aria-labelledby="{id}-title">{heading}{"".join(parts)}</section>'


def _list(heading: str, sentences: Iterable[str]) -> str:
    items = "".join(f"<li>{_sentence_with_topic(sentence)}</li>" for sentence in sentences)
    return f"<div><h3>{escape(heading)}</h3><ul>{items}</ul></div>"


def _sentence_with_topic(sentence: str) -> str:
    """Emphasize the topic of `Topic: ...`."""
    topic, colon, rest = sentence.partition(": ")
    return f"<strong>{escape(topic)}:</strong> {escape(rest)}" if colon else escape(sentence)


def _chart(chart: Chart) -> str:
    id, title = f"chart-{escape(chart.id)}", escape(chart.title)
    label = escape(f"{chart.title}. {chart.caption} The numbers are in the table below.")
    size = " wide" if chart.wide else ""
    # role=img names the drawing without hiding it from the mouse.
    return (
        f'<figure id="{id}" class="chart {chart.kind}{size}" data-chart="{escape(chart.id)}">'
        f"<figcaption><h3>{title}</h3><p>{escape(chart.caption)}</p></figcaption>"
        f"{_selects(chart, id)}"
        f'<ul class="legend" aria-label="Curves of {title}; press to hide or show"></ul>'
        f'<div class="plot" role="img" aria-label="{label}"></div>'
        '<p class="missing" role="status" hidden></p>'
        "<details><summary>The numbers of this chart as a table</summary>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="Numbers of {title}"></div>'
        "</details></figure>"
    )


def _selects(chart: Chart, id: str) -> str:
    """Render a native select per selector with more than one option."""
    parts = []
    for position, selector in enumerate(chart.selectors):
        if len(selector.options) > 1:
            options = "".join(
                f'<option value="{index}">{escape(name)}</option>'
                for index, name in enumerate(selector.options)
            )
            parts.append(
                f'<label for="{id}-{position}">{escape(selector.label)} '
                f'<select id="{id}-{position}" data-choice="{position}">{options}</select></label>'
            )
    return f'<div class="choices">{"".join(parts)}</div>' if parts else ""


def _table(table: Table) -> str:
    head = "".join(
        f'<th scope="col">{escape(name)}</th>' if name else "<td></td>" for name in table.head
    )
    rows = "".join(map(_row, table.rows))
    caption = escape(table.caption)
    size = " long" if len(table.rows) > SCROLL_ROWS else ""
    return (
        f'<div class="scroll{size}" tabindex="0" role="region" aria-label="{caption}">'
        f"<table><caption><span>{caption}</span></caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _row(row: Sequence[str]) -> str:
    cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
    return f'<tr><th scope="row">{escape(row[0])}</th>{cells}</tr>'


def _text_block(block: TextBlock) -> str:
    return f'<h3>{escape(block.title)}</h3><pre tabindex="0">{escape(block.text)}</pre>'
