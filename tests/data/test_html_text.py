"""HTML to paragraphs: what is text, where a paragraph ends, and pages that are not quite HTML."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoe.data.debian_guide import html_paragraphs


@pytest.mark.parametrize(
    ("html", "paragraphs"),
    [
        ("<p>one</p><p>two</p>", ["one", "two"]),
        ("<p>one\n  line, <b>bold</b> and <i>slanted</i></p>", ["one line, bold and slanted"]),
        ("a<br>b<hr>c", ["a", "b", "c"]),
        ("<ul><li>first<li>second</ul>", ["first", "second"]),
        ("<table><tr><th>k<td>v</table>", ["k", "v"]),
        ("<pre>x = 1\n  y  = 2\n\n</pre>z\nz", ["x = 1", "y = 2", "z z"]),
        ("&lt;tag&gt; &amp; &#252; &nbsp; x", ["<tag> & ü x"]),
        ("<head><title>no</title></head><body>yes</body>", ["yes"]),
        ("<head><title>no</title><body>yes", ["yes"]),  # the head's end tag may be left out
        ("<p>a<script>var x = '<p>no</p>';</script>b</p>", ["ab"]),
        ("<style>p { color: red }</style>yes", ["yes"]),
        ("<nav>no<nav>no</nav>no</nav>yes", ["yes"]),
        (
            '<div class="navheader">no<div>no</div>no</div>yes<div class="navfooter">no</div>',
            ["yes"],
        ),
        ('<div class="sect1">yes<div>yes</div>yes</div>', ["yes", "yes", "yes"]),
        ("<p></p>  <p> \n </p>", []),
        ("", []),
        ("</p></div>text", ["text"]),
    ],
)
def test_what_is_text(html: str, paragraphs: list[str]) -> None:
    assert html_paragraphs(html) == paragraphs


@given(
    st.lists(
        st.sampled_from(
            [
                "<p>",
                "</p>",
                "<head>",
                "</head>",
                "<body>",
                "<pre>",
                "</pre>",
                "<nav",
                ">",
                "x ",
                "&",
                "<!--",
            ]
        )
    )
)
def test_damaged_html_raises_nothing(pieces: list[str]) -> None:
    assert all(text and text == " ".join(text.split()) for text in html_paragraphs("".join(pieces)))
