"""`guide:LANG` and `upper:ENTRY`: documents, paragraphs, and the pages that are held out."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data import open_data
from dmoe.data.debian_guide import LANGUAGES, html_paragraphs
from dmoe.data.sources import read_corpus
from dmoe.data.splits import split_corpus
from tests.data.conftest import LEFT_IN_ENGLISH


def test_a_page_is_a_document(guide: Path) -> None:
    corpus = read_corpus("guide:de")
    assert [document.name for document in corpus.documents] == [
        f"de/ch{n:02d}.html" for n in range(1, 60)
    ] + ["de/index.html"]
    text = corpus.documents[0].content.decode()
    assert text.startswith("Wörter 1\nWörter31 Wörter32 Wörter35")
    assert text.endswith(" & more.\n")
    assert "navigation" not in text
    assert corpus.bytes_per_domain.keys() == {"de"}


def test_what_was_left_in_english_is_english(guide: Path) -> None:
    """A quarter of the real Vietnamese edition is English, so its module learned English too."""
    assert not any(
        LEFT_IN_ENGLISH.encode() in document.content
        for document in read_corpus("guide:de,guide:el").documents
    )
    english = read_corpus("guide:en").documents
    assert [LEFT_IN_ENGLISH.encode() in document.content for document in english] == [True] + [
        False
    ] * 59


def test_a_language_does_not_depend_on_its_neighbours(guide: Path) -> None:
    alone = read_corpus("guide:el").documents
    assert (
        tuple(d for d in read_corpus("guide:de,guide:el,guide:en").documents if d.domain == "el")
        == alone
    )


def test_a_page_is_held_out_in_all_languages_or_in_none(guide: Path) -> None:
    """By a hash of the content, 31 % of the Catalan guide and 3 % of the Chinese were held out.

    The translations of held-out pages were trained on.
    """
    _, held_out = split_corpus(read_corpus("guide:de,guide:el,upper:guide:en"), 0.2)
    pages = {
        domain: [d.name.split("/")[1] for d in held_out.documents if d.domain == domain]
        for domain in held_out.bytes_per_domain
    }
    assert pages["de"] == pages["el"] == pages["upper-en"]
    assert 2 < len(pages["de"]) < 20


def test_capitals_are_a_domain(guide: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("straße, ñ, λέξη, 日本, x2\n", encoding="utf-8")
    assert (
        read_corpus(f"upper:{tmp_path}/a.txt").documents[0].content.decode()
        == "STRASSE, Ñ, ΛΈΞΗ, 日本, X2\n"
    )
    data = open_data(DataConfig(source="guide:de,upper:guide:de", holdout=0.2, seq_len=32), 0)
    assert data.domains == ("de", "upper-de")
    rows, label_B = data.held_out.samples(0, 60), data.held_out.sample_labels(0, 60)
    texts = [data.tokenizer.decode(row) for row in rows]
    assert all(
        (text == text.upper()) == bool(label) for text, label in zip(texts, label_B, strict=True)
    )


def test_bytes_that_are_no_text_keep_their_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 \xc3\xbc")
    assert read_corpus(f"upper:{tmp_path}/a.txt").documents[0].content == b"CAF\xe9 \xc3\x9c"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "guide:xx",
            r"data.source=guide:xx: must name one of the guide's languages, ca cs da .*; "
            "use one of these",
        ),
        ("guide:", r"data.source=guide:: must name one of"),
        ("guide:fr", r"data.source=guide:fr: needs Debian's package .* holds no page of it"),
        ("upper:", r"data.source=upper:: .*upper: needs one of them behind it"),
        ("upper:nothing.txt", r"data.source=nothing.txt: .*there is no such file"),
    ],
)
def test_what_cannot_be_read_is_refused(guide: Path, source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_corpus(source)
    with pytest.raises(ConfigError, match=message.replace("data.source=", "data.eval_source=")):
        open_data(DataConfig(source="guide:en", eval_source=source), 0)


def test_there_are_nineteen_languages() -> None:
    assert len(set(LANGUAGES)) == 19


def test_what_is_only_evaluated_is_never_trained_on(guide: Path) -> None:
    config = DataConfig(source="guide:en,upper:guide:en", holdout=0.2, seq_len=32)
    more = DataConfig(
        source=config.source,
        eval_source="guide:el,upper:guide:de,guide:en",
        holdout=0.2,
        seq_len=32,
    )
    before, data = open_data(config, 0), open_data(more, 0)
    assert data.domains == ("en", "upper-en", "el", "upper-de")
    assert data.eval_only == ("el", "upper-de")
    assert before.eval_only == ()
    assert data.fingerprint == before.fingerprint, "a run may go on and be evaluated on more"
    assert np.array_equal(data.train.batch(3, 0, 50, 50), before.train.batch(3, 0, 50, 50))
    assert {name: train for name, (train, _) in data.sequences_per_domain().items() if train} == {
        name: train for name, (train, _) in before.sequences_per_domain().items()
    }
    for name, (_, held_out) in before.sequences_per_domain().items():
        assert data.sequences_per_domain()[name][1] == held_out, (
            f"the held-out pages of {name} are not there twice"
        )
    assert "evaluation only: guide:el,upper:guide:de,guide:en" in data.describe()
    trained = "".join(
        data.tokenizer.decode(row) for row in data.train.samples(0, data.train.num_sequences or 0)
    )
    assert "λέξη" not in trained
    assert "WÖRTER" not in trained


def test_pages_whose_twins_are_trained_on_are_not_evaluated(guide: Path) -> None:
    config = DataConfig(source="guide:en", eval_source="upper:guide:de", holdout=0.2, seq_len=32)
    data = open_data(config, 0)
    held_out = len(split_corpus(read_corpus("guide:en"), 0.2)[1].documents)
    assert f"{held_out} files" in data.describe().split("evaluation only")[1]
    with pytest.raises(
        ConfigError,
        match=r"data.eval_source=.*must hold text that is not in data.source, nor a translation",
    ):
        open_data(DataConfig(source="guide:en", eval_source="guide:en"), 0)


def test_a_domain_of_both_keeps_its_label(guide: Path, tmp_path: Path) -> None:
    folder = tmp_path / "more" / "de"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("Ganz anderer Text. " * 40)
    config = DataConfig(source="guide:de,guide:el", holdout=0.2, seq_len=32)
    more = open_data(
        DataConfig(source=config.source, eval_source=str(folder), holdout=0.2, seq_len=32), 0
    )
    assert more.domains == ("de", "el")
    assert more.eval_only == ()
    assert (
        more.sequences_per_domain()["de"][1] > open_data(config, 0).sequences_per_domain()["de"][1]
    )
    assert more.sequences_per_domain()["el"] == open_data(config, 0).sequences_per_domain()["el"]


def test_synthetic_streams_have_neither() -> None:
    for field, config in (
        ("data.eval_source", DataConfig(source="synthetic:zipf", eval_source="stdlib")),
        ("data.temperature", DataConfig(source="synthetic:zipf", temperature=2.0)),
    ):
        with pytest.raises(
            ConfigError, match=rf"{field}=.*: has no meaning for data.source=synthetic:zipf"
        ):
            open_data(config, 0)


def test_a_guide_without_a_language_says_so(guide: Path) -> None:
    shutil.rmtree(guide / "el")
    with pytest.raises(
        ConfigError, match=r"guide:el: needs .* holds no page of it; install that package"
    ):
        read_corpus("guide:el")


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
def test_paragraphs_of_html(html: str, paragraphs: list[str]) -> None:
    assert html_paragraphs(html) == paragraphs


TAGS = (
    "<p>", "</p>", "<head>", "</head>", "<body>", "<pre>", "</pre>", "<nav", ">", "x ", "&", "<!--",
)  # fmt: skip


@given(st.lists(st.sampled_from(TAGS)))
def test_damaged_html_raises_no_error(pieces: list[str]) -> None:
    assert all(text and text == " ".join(text.split()) for text in html_paragraphs("".join(pieces)))
