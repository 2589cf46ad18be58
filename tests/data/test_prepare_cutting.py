"""Pieces of a text have, one after the other, the tokens of the whole."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data import Tokenizer, open_tokenizer
from dmoe.data.prepare import cutting
from dmoe.data.prepare.cutting import pieces
from dmoe.data.prepare.documents import MemoryContent, SourceDocument
from dmoe.data.tokenizers.hf_json import byte_alphabet
from tests.data.conftest import merged_ranks

PATTERNS = ("r50k_base", "cl100k_base", "o200k_base")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Every word pattern, with merges over line breaks and spaces."""
    import base64

    folder = tmp_path_factory.mktemp("tokenizers")
    ranks = [*merged_ranks(), b"\n ", b"\nt", b".\n", b"\r\n", b"/\n", b" a", b"a\n"]
    lines = [f"{base64.b64encode(rank).decode()} {n}\n" for n, rank in enumerate(ranks)]
    found = {}
    for name in PATTERNS:
        (folder / f"{name}.tiktoken").write_text("".join(lines))
        config = DataConfig(tokenizer=str(folder / f"{name}.tiktoken"))
        found[name] = open_tokenizer(config)
    for name in ("words", "none", "lines in words"):
        path = folder / f"{name}.json"
        body = _bpe(ranks, words=name == "words")
        if name == "lines in words":
            split = {"type": "Split", "pattern": {"Regex": "[^ ]+| +"}}
            split |= {"behavior": "Isolated", "invert": False}
            parts = [split, body["pre_tokenizer"]]
            body["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
        path.write_text(json.dumps(body))
        found[name] = open_tokenizer(DataConfig(tokenizer=str(path)))
    return found


def _bpe(ranks: list[bytes], words: bool) -> dict[str, Any]:
    letter = {value: character for character, value in byte_alphabet().items()}
    written = ["".join(letter[b] for b in rank) for rank in ranks]
    known, merges = set(ranks), []
    for rank in ranks[256:]:
        cuts = [i for i in range(1, len(rank)) if rank[:i] in known and rank[i:] in known]
        parts = rank[: cuts[0]], rank[cuts[0] :]
        merges.append(["".join(letter[b] for b in part) for part in parts])
    pre = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": pre if words else {**pre, "use_regex": False},
        "post_processor": None,
        "decoder": {**pre},
        "model": {
            "type": "BPE",
            "vocab": {token: n for n, token in enumerate(dict.fromkeys(written))},
            "merges": merges,
        },
    }


TEXT = st.lists(
    st.sampled_from(
        ["the", " token", "\n", "\n\n", "\r\n", " ", "  ", ".", "!\n", "/", "'s", "42", "é", "中",
         "\u3000", "\u00a0", "\U0001f600", "aB", "\t", "expert", "\nthe", "a\n", ".\n/", "1234567"]
    ),
    min_size=60,
    max_size=200,
).map("".join)  # fmt: skip


@pytest.mark.parametrize("name", [*PATTERNS, "words"])
def test_pieces_have_the_tokens_of_the_whole(encoders: dict[str, Tokenizer], name: str) -> None:
    tokenizer, cuts = encoders[name], list[int]()

    @settings(max_examples=60, deadline=None)
    @given(text=TEXT, damage=st.booleans())
    def check(text: str, damage: bool) -> None:
        data = text.encode()
        if damage:
            data = data[: len(data) // 2] + b"\xff" + data[len(data) // 2 + 1 :]
        document = SourceDocument(MemoryContent(data), "x", "x")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cutting, "WINDOW", 16)
            found = list(pieces(document, 0, len(data), tokenizer, size=8))
        assert b"".join(found) == data
        cuts.append(max(0, len(found) - 1))
        whole = tokenizer.encode(data)
        assert np.array_equal(np.concatenate([*map(tokenizer.encode, found), whole[:0]]), whole)

    check()
    assert sum(cuts) > 50


def test_a_pattern_that_crosses_lines_is_noticed(encoders: dict[str, Tokenizer]) -> None:
    """Its words hold line breaks, and a token begins with one: only other places are cut."""
    tokenizer = encoders["lines in words"]
    data = b"expert of\nta\nta gate, of it " * 400
    document = SourceDocument(MemoryContent(data), "x", "x")
    found = list(pieces(document, 0, len(data), tokenizer, size=512))
    assert len(found) > 5
    whole = tokenizer.encode(data)
    assert np.array_equal(np.concatenate([*map(tokenizer.encode, found)]), whole)


def test_a_text_without_a_place_to_cut_is_refused(
    encoders: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "LONGEST", 5000)
    data = b"a" * 20_000
    document = SourceDocument(MemoryContent(data), "long.txt", "x")
    with pytest.raises(ConfigError, match=r"long.txt: has more than .* use data.tokenizer=bytes"):
        list(pieces(document, 0, len(data), encoders["words"], size=512))
    # without words, merges could reach from one end to the other
    lines = b"line\n" * 4000
    document = SourceDocument(MemoryContent(lines), "long.txt", "x")
    assert len(list(pieces(document, 0, 4000, encoders["words"], size=512))) > 1
    assert len(list(pieces(document, 0, 4000, encoders["none"], size=512))) == 1
    bytes_only = open_tokenizer(DataConfig())
    assert b"".join(pieces(document, 0, len(lines), bytes_only, size=512)) == lines
