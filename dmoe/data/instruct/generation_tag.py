"""The tag `{% generation %}` of chat templates: puts START and END around what it holds.

transformers' tag gives positions of the answers instead; the text is the same without the two
characters.
"""

from __future__ import annotations

from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

START, END = "\ufdd0", "\ufdd1"
"""Around each answer that a template marks; Unicode's noncharacters, which no text holds."""


class GenerationTag(Extension):
    """Jinja2 extension for one tag."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{START}{caller()}{END}"
