"""Parser of a report: its data, and its text as a browser shows it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


class Page(HTMLParser):
    """A parsed report.

    `data` is the JSON of the charts, `tags` all elements with their attributes, and `text` all text
    outside of scripts and styles.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.data: dict[str, Any] = {}
        self._inside = ""
        self._joins = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        # a name may break there; it is one text
        self._joins = tag == "wbr"
        if tag in ("script", "style"):
            self._inside = "data" if dict(attrs).get("id") == "report-data" else tag

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "data":
            self.data = json.loads(data)
        elif self._joins:
            self.texts[-1] += data
        elif not self._inside:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def view(self, chart: str, key: str = "") -> dict[str, Any]:
        return self.data["charts"][chart]["views"][key]

    def quality(self, quantity: str) -> dict[str, Any]:
        """Return the view of the first chart with this quantity."""
        options = self.data["charts"]["loss"]["choices"][0]["options"]
        return self.view("loss", str(options.index(quantity)))

    def curve(self, chart: str, name: str, key: str = "") -> dict[int, float | None]:
        """Return the values of a curve by step. A quantity may take the place of the chart."""
        if chart[0].isupper():
            options = self.data["charts"]["loss"]["choices"][0]["options"]
            chart, key = "loss", str(options.index(chart))
        found = [curve for curve in self.view(chart, key)["curves"] if curve["name"] == name]
        assert len(found) == 1, [curve["name"] for curve in self.view(chart, key)["curves"]]
        return dict(zip(found[0]["x"], found[0]["y"], strict=True))


def read_page(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page
