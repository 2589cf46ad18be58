"""Small corpora and tokenizers made on the spot: nothing here is fetched."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from dmoe.data import debian_guide

WORDS = ["the", "expert", "routes", "tokens", "über", "capacity", "и", "専門家", "42", "gate"]


def text_of_file(number: int, words: int = 200) -> str:
    """A text that differs from every other number's."""
    return (
        " ".join(WORDS[(number * 7 + i * i + i // 3) % len(WORDS)] for i in range(words))
        + f"\nfile {number}\n"
    )


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A directory with 60 text files in two sub-directories."""
    root = tmp_path / "texts"
    for number in range(60):
        folder = root / ("even" if number % 2 == 0 else "odd")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}.txt").write_text(text_of_file(number), encoding="utf-8")
    return root


def merged_ranks() -> list[bytes]:
    """Byte-pair ranks in which every merge is of two earlier ranks."""
    merges = [
        b"th",
        b"the",
        b" t",
        b"ex",
        b"exp",
        b"er",
        b"exper",
        b"to",
        b"tok",
        b"en",
        b"token",
        b" token",
        b"\n\n",
    ]
    return [bytes([value]) for value in range(256)] + merges


@pytest.fixture
def rank_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.tiktoken"
    lines = [
        f"{base64.b64encode(piece).decode()} {rank}" for rank, piece in enumerate(merged_ranks())
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def tekken_file(tmp_path: Path) -> Path:
    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(p).decode(), "token_str": None}
        for i, p in enumerate(merged_ranks())
    ]
    config = {
        "pattern": r"\s?\p{L}+|[^\p{L}]",
        "default_vocab_size": 264,
        "default_num_special_tokens": 2,
        "version": "v3",
    }
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps({"config": config, "vocab": vocab}))
    return path


GUIDE_PAGE = """<html><head><meta charset="UTF-8"><title>{title}</title></head><body>
<div class="navheader"><table><tr><td><a href="index.html">navigation</a></td></tr></table></div>
<div class="sect1"><h2>{title}</h2>{body}</div>
<div class="navfooter"><div>navigation</div></div></body></html>
"""
LEFT_IN_ENGLISH = "This paragraph of more than forty characters was never translated."


def write_guide(root: Path, pages: int = 60) -> Path:
    """Write a small guide in English, German and Greek.

    All pages differ, and one paragraph is in English in all of them.
    """
    for language, word in (("en", "word"), ("de", "Wörter"), ("el", "λέξη")):
        (root / language).mkdir(parents=True)
        for number in range(pages):
            name = "index.html" if number == 0 else f"ch{number:02d}.html"
            sentence = " ".join(f"{word}{(number * 31 + i * i) % 97}" for i in range(30))
            body = f"<p>{LEFT_IN_ENGLISH}</p>\n<p>{sentence} &amp; <b>more</b>.</p>"
            (root / language / name).write_text(
                GUIDE_PAGE.format(title=f"{word} {number}", body=body), encoding="utf-8"
            )
    return root


@pytest.fixture
def guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed guide."""
    root = write_guide(tmp_path / "share" / debian_guide.PACKAGE)
    monkeypatch.setattr(debian_guide, "INSTALLED", root)
    return root
