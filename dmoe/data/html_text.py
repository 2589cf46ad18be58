"""HTML to paragraphs of plain text, with the standard library alone.

What is no text of the page (head, scripts, styles, navigation) is dropped; a block tag ends a paragraph; white space is joined, except
inside `pre`, where each line is a paragraph of its own.
"""

from __future__ import annotations

from html.parser import HTMLParser

__all__ = ["html_paragraphs"]

_DROPPED = frozenset({"head", "script", "style", "nav"})
_BLOCKS = frozenset((
    "address", "article", "aside", "blockquote", "body", "br", "dd", "details", "div", "dl", "dt", "figcaption", "figure", "footer",
    "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "html", "li", "main", "ol", "p", "pre", "section", "summary", "table",
    "tbody", "td", "tfoot", "th", "thead", "tr", "ul",
))  # fmt: skip


def html_paragraphs(html: str) -> list[str]:
    """The paragraphs of a page, in order, none empty. Damaged HTML raises nothing: what can be read is read."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    reader.end_paragraph()
    return reader.paragraphs


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._open: list[str] = []
        """The pieces of the paragraph that has not ended yet."""
        self._dropping: list[str] = []
        """The dropped element's tag, once for each element of that name that is open inside."""
        self._preformatted = False

    def end_paragraph(self) -> None:
        text = "".join(self._open)
        self._open.clear()
        lines = text.splitlines() if self._preformatted else [text]
        self.paragraphs += [joined for joined in (" ".join(line.split()) for line in lines) if joined]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._dropping:
            if tag == "body":  # a head may end without its end tag
                self._dropping.clear()
            elif tag == self._dropping[0]:
                self._dropping.append(tag)
            return
        if tag in _BLOCKS:
            self.end_paragraph()
        if tag in _DROPPED or _is_navigation(attrs):
            self._dropping.append(tag)
        elif tag == "pre":
            self._preformatted = True

    def handle_endtag(self, tag: str) -> None:
        if self._dropping:
            if tag == self._dropping[0]:
                self._dropping.pop()
            return
        if tag in _BLOCKS:
            self.end_paragraph()
        if tag == "pre":
            self._preformatted = False

    def handle_data(self, data: str) -> None:
        if not self._dropping:
            self._open.append(data)


def _is_navigation(attrs: list[tuple[str, str | None]]) -> bool:
    """DocBook's pages are older than the tag `nav`: theirs is a `div` of one of these classes."""
    return any(name == "class" and value in ("navheader", "navfooter") for name, value in attrs)
