"""Text as it streams: whole characters, no part of a stop string, the same text in the end."""

from __future__ import annotations

import random

import pytest

from dmoe.cli.text_stream import TextStream
from dmoe.data.tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()


def stream(text: bytes, prompt: bytes = b"", stop: tuple[str, ...] = ()) -> tuple[list[str], str]:
    """Return the parts that are written, and the text."""
    parts: list[str] = []
    out = TextStream(TOKENIZER.decode, list(prompt), stop, parts.append)
    for byte in text:
        if out.add(byte):
            break
    return parts, out.end()


def test_characters_are_written_whole() -> None:
    parts, text = stream("aé€😀".encode())
    assert parts == ["a", "é", "€", "😀"]
    assert text == "aé€😀"


def test_a_character_that_the_prompt_begins_is_the_texts() -> None:
    assert stream("é".encode()[1:] + b"b", prompt="xé".encode()[:2]) == (["é", "b"], "éb")


def test_invalid_bytes_are_shown_at_last() -> None:
    assert stream(b"a\xff\xfe") == (["a", "\ufffd", "\ufffd"], "a\ufffd\ufffd")


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        (b"one\ntwo", ("\n",), "one"),
        (b"aab aac", ("aac",), "aab "),
        (b"ababac!", ("abac",), "ab"),
        (b"x END", ("END", "D"), "x "),
        (b"never", ("?!",), "never"),
        (b"cut EN", ("END",), "cut EN"),
        ("ü€".encode(), ("€",), "ü"),
    ],
)
def test_a_stop_string_ends_the_text_and_is_never_written(text, stop, expected) -> None:
    parts, found = stream(text, stop=stop)
    assert found == "".join(parts) == expected


def test_any_bytes_give_the_text_of_all_tokens() -> None:
    draw = random.Random(0)
    for _ in range(300):
        data = bytes(draw.choice(b"ab\xc3\xa9\xe2\x82\xac\xf0\x9f\xff\n") for _ in range(20))
        parts, text = stream(data, prompt=data[:3], stop=("ab\n",))
        whole = TOKENIZER.decode(data[:3] + data)
        shown = TOKENIZER.decode(data[:3]).removesuffix("\ufffd") + text
        assert "".join(parts) == text
        assert whole.startswith(shown)
        assert whole == shown or whole[len(shown) :].startswith("ab\n")
