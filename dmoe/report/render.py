"""Markup of a report: one HTML document with its style, data and scripts.

This is the only module that writes markup, so the only one that escapes. Names of runs, alerts and
text samples come from outside. Every text passes `escape`, the data of the charts contains no `<`,
and a content security policy allows only the script with the listed hash: markup that is not
escaped by mistake still runs nothing, and nothing is loaded.

The charts are drawn by the scripts of this folder, about 30 kB, without a plotting library.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from dmoe import __version__
from dmoe.report.format import plural
from dmoe.report.page import Chart, Overview, Panel, Selector, Table, TextBlock, Tile

SCROLL_ROWS = 30
"""Tables with more rows scroll in a frame of their own."""
SCRIPTS = ("svg.js", "curves.js", "matrix.js", "page.js")
"""In the order in which they are joined to one."""
TABLE_ICON = (
    '<svg viewBox="0 0 16 16" width="16" height="16" aria-hidden="true">'
    '<path d="M1.5 2.5h13v11h-13zM1.5 6h13M1.5 9.7h13M6 2.5v11" fill="none" '
    'stroke="currentColor"/></svg>'
)


def render_page(
    names: Sequence[str], overview: Overview, panels: Sequence[Panel], marks: Sequence[Any]
) -> str:
    """Render the whole file.

    Args:
        names: names of the runs.
        overview: the first screen.
        panels: sections in order.
        marks: per run, the events that curves show (`panels.summary.event_marks`).
    """
    charts = [*overview.charts, *(chart for panel in panels for chart in panel.charts)]
    data = {
        "runs": list(names),
        "marks": list(marks),
        "charts": {chart.id: _chart_data(chart) for chart in charts},
    }
    script = page_script()
    title = escape(overview.title)
    links = "".join(
        f'<li><a href="#{escape(panel.id)}">{escape(panel.title)}</a></li>' for panel in panels
    )
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_security_policy(script)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f'<link rel="icon" href="data:,">\n<title>{title} - dmoe report</title>',
            f"<style>{_read_asset('page.css')}</style>\n</head>",
            '<body>\n<a class="skip" href="#main">Skip to the content</a>',
            f"<header><h1>{title}</h1>{_facts(overview.facts)}</header>",
            '<main id="main" tabindex="-1">',
            _overview(overview),
            "<noscript><p>The charts need JavaScript. The tables, events and samples do not."
            "</p></noscript>",
            f'<nav aria-label="Sections"><ul>{links}'
            '<li><button type="button" id="open-all">Open all</button></li></ul></nav>',
            *map(_panel, panels),
            f"</main>\n<footer><p>dmoe {escape(__version__)}</p></footer>",
            f'<script type="application/json" id="report-data">{_json_for_script(data)}</script>',
            f"<script>{script}</script>",
            "</body>\n</html>\n",
        ]
    )


def page_script() -> str:
    """Return the scripts of the page, joined in a scope of their own."""
    return "(() => {\n" + "\n".join(map(_read_asset, SCRIPTS)) + "})();\n"


def _read_asset(name: str) -> str:
    return files("dmoe.report").joinpath(name).read_text(encoding="utf-8")


def _security_policy(script: str) -> str:
    assert "</script" not in script.lower(), "would end the script element early"
    assert "\r" not in script, "browsers replace it by a line feed, which changes the hash"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rest = "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src 'sha256-{digest}'; {rest}"


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
        "options": list(chart.options),
        "views": dict(chart.views),
    }


def _facts(facts: Mapping[str, str]) -> str:
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items()
    )
    return f"<dl>{items}</dl>" if items else ""


def _overview(overview: Overview) -> str:
    parts = [f'<p class="sentence">{escape(overview.sentence)}</p>']
    if overview.tiles:
        parts.append(f'<ul class="tiles">{"".join(map(_tile, overview.tiles))}</ul>')
    cards = "".join([*map(_table, overview.tables), *map(_chart, overview.charts)])
    parts.append(f'<div class="charts">{cards}</div>' if cards else "")
    return f'<section id="overview" aria-label="Overview">{"".join(parts)}</section>'


def _tile(tile: Tile) -> str:
    return (
        f'<li class="tile {tile.state}"><span class="name">{escape(tile.title)}</span>'
        f"<strong>{escape(tile.value)}</strong>"
        f'<span class="detail">{escape(tile.detail)}</span></li>'
    )


def _groups(
    tables: Iterable[Table], lists: Mapping[str, Sequence[str]], charts: Iterable[Chart]
) -> list[str]:
    groups = {
        "tables": map(_table, tables),
        "lists": (_list(*item) for item in lists.items()),
        "charts": map(_chart, charts),
    }
    joined = {name: "".join(rendered) for name, rendered in groups.items()}
    return [f'<div class="{name}">{content}</div>' for name, content in joined.items() if content]


def _panel(panel: Panel) -> str:
    id = escape(panel.id)
    parts = [f"<p>{escape(sentence)}</p>" for sentence in panel.sentences]
    if panel.constant:
        values = "; ".join(panel.constant)
        parts.append(f'<p class="constant">Without a chart: {escape(values)}.</p>')
    parts += _groups(panel.tables, panel.lists, panel.charts)
    parts += [_text_block(block) for block in panel.texts]
    return (
        f'<section aria-labelledby="{id}-title"><details class="panel" id="{id}">'
        f'<summary><h2 id="{id}-title">{escape(panel.title)}</h2>'
        f"<span>{escape(panel.gist or _count_parts(panel))}</span></summary>"
        f"{''.join(parts)}</details></section>"
    )


def _count_parts(panel: Panel) -> str:
    parts = {"chart": panel.charts, "table": panel.tables, "text": panel.texts}
    found = [plural(len(part), noun) for noun, part in parts.items() if part]
    if panel.constant:
        found.append(f"{len(panel.constant)} constant")
    return ", ".join(found) or "nothing recorded"


def _list(heading: str, sentences: Iterable[str]) -> str:
    items = "".join(f"<li>{_sentence_with_topic(sentence)}</li>" for sentence in sentences)
    return f"<div><h3>{escape(heading)}</h3><ul>{items}</ul></div>"


def _sentence_with_topic(sentence: str) -> str:
    """Emphasize the topic of `Topic: ...`."""
    topic, colon, rest = sentence.partition(": ")
    return f"<strong>{escape(topic)}:</strong> {escape(rest)}" if colon else escape(sentence)


def _chart(chart: Chart) -> str:
    id, title = f"chart-{escape(chart.id)}", escape(chart.title)
    label = escape(f"{chart.title}. {chart.caption} The numbers are in the table of this chart.")
    size = " wide" if chart.wide else ""
    # role=img names the drawing without hiding it from the mouse.
    return (
        f'<figure id="{id}" class="chart {chart.kind}{size}" data-chart="{escape(chart.id)}">'
        f"<figcaption><h3>{title}</h3><p>{escape(chart.caption)}</p></figcaption>"
        f"{_choices(chart, id)}"
        f'<ul class="legend" aria-label="Curves of {title}; press to hide or show"></ul>'
        f'<div class="plot" role="img" aria-label="{label}"></div>'
        '<p class="missing" role="status" hidden></p>'
        f'<details class="numbers"><summary title="Numbers as a table">{TABLE_ICON}'
        f'<span class="hidden">Numbers of {title} as a table</span></summary>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="Numbers of {title}"></div>'
        "</details></figure>"
    )


def _choices(chart: Chart, id: str) -> str:
    """Render a native select, or radio buttons, per selector with more than one option."""
    parts = [
        _choice(selector, f"{id}-{position}", f'data-choice="{position}"')
        for position, selector in enumerate(chart.selectors)
        if len(selector.options) > 1
    ]
    parts += [
        _choice(Selector(name, options, is_switch=True), f"{id}-{name}", f'data-option="{name}"')
        for name, options in chart.options.items()
    ]
    return f'<div class="choices">{"".join(parts)}</div>' if parts else ""


def _choice(selector: Selector, id: str, data: str) -> str:
    label = escape(selector.label)
    if selector.is_switch:
        buttons = "".join(
            f'<label><input type="radio" name="{id}" value="{index}" {data}'
            f"{'' if index else ' checked'}><span>{escape(name)}</span></label>"
            for index, name in enumerate(selector.options)
        )
        return f'<fieldset><legend class="hidden">{label}</legend>{buttons}</fieldset>'
    options = "".join(
        f'<option value="{index}">{escape(name)}</option>'
        for index, name in enumerate(selector.options)
    )
    return f'<label for="{id}">{label} <select id="{id}" {data}>{options}</select></label>'


def _table(table: Table) -> str:
    head = "".join(
        f'<th scope="col">{escape(name)}</th>' if name else "<td></td>" for name in table.head
    )
    rows = "".join(_row(index, row, table) for index, row in enumerate(table.rows))
    caption = escape(table.caption)
    size = " long" if len(table.rows) > SCROLL_ROWS else ""
    return (
        f'<div class="scroll{size}" tabindex="0" role="region" aria-label="{caption}">'
        f"<table><caption><span>{caption}</span></caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _row(index: int, row: Sequence[str], table: Table) -> str:
    cells = "".join(
        f'<td class="best"><strong>{escape(cell)}</strong> <span>best</span></td>'
        if (index, column) in table.best
        else f"<td>{escape(cell)}</td>"
        for column, cell in enumerate(row[1:], 1)
    )
    # names of settings may break where their parts end
    name = re.sub(r"([._])", r"\1<wbr>", escape(row[0]))
    return f'<tr><th scope="row">{name}</th>{cells}</tr>'


def _text_block(block: TextBlock) -> str:
    return f'<h3>{escape(block.title)}</h3><pre tabindex="0">{escape(block.text)}</pre>'
