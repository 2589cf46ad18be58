from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data.tokenizers import Tokenizer, byte_tokenizer, open_tokenizer
from dmoe.data.tokenizers.hf_json import byte_alphabet
from tests.data.conftest import WORDS, merged_ranks, text_of_file

TEXT = (
    "the experts\troute  tokens,\r\n\n  über 専門家 и 😀 e\u0301 don't <|endoftext|> 3.14\u00a0end "
)


def open_file(path: Path | str, vocab: int | None = None) -> Tokenizer:
    return open_tokenizer(DataConfig(tokenizer=str(path), tokenizer_vocab=vocab))


def trained_json(tmp_path: Path, **byte_level: bool) -> Path:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**({"add_prefix_space": False} | byte_level))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text_of_file(i) for i in range(10)], trainer)
    path = tmp_path / "trained.json"
    tokenizer.save(str(path))
    return path


def assert_lossless(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text.encode())
    assert ids.dtype == np.int64
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.separator not in ids
    assert ids.size == 0 or ids.max() < tokenizer.vocab_size == len(tokenizer.token_bytes)


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    assert_lossless(byte_tokenizer(), text.replace("\0", ""))


def test_bytes_are_256_and_nul_is_the_separator() -> None:
    tokenizer = open_file("bytes")
    assert (tokenizer.vocab_size, tokenizer.separator) == (256, 0)
    assert tokenizer.token_bytes.tolist() == [0] + [1] * 255
    assert tokenizer.encode(b"a\0b\xff").tolist() == [97, 98, 255]
    assert tokenizer.decode([97, 0, 98]) == "ab"


def test_decoding_never_raises() -> None:
    assert byte_tokenizer().decode(np.array([0xC3, 0x28, 999, -1])) == "\ufffd(\ufffd\ufffd"


def test_rank_file(rank_file: Path) -> None:
    tokenizer = open_file(rank_file)
    assert tokenizer.vocab_size == len(merged_ranks())
    assert_lossless(tokenizer, TEXT)
    piece = [tokenizer.decode([i]) for i in tokenizer.encode(b"the experts token")]
    assert piece == ["the", " ", "exper", "t", "s", " token"]
    assert "cl100k" in tokenizer.name, "the guessed word pattern is named"
    assert tokenizer.encode(b"a\0b").tolist() == tokenizer.encode(b"ab").tolist()


@pytest.mark.parametrize("vocab", [256, 257, 260, 263, 269])
def test_any_prefix_of_the_ranks_is_a_tokenizer(rank_file: Path, vocab: int) -> None:
    tokenizer = open_file(rank_file, vocab)
    assert tokenizer.vocab_size == vocab
    assert_lossless(tokenizer, TEXT)


def test_long_runs_do_not_overflow_the_regular_expression(rank_file: Path) -> None:
    tokenizer = open_file(rank_file)
    assert_lossless(tokenizer, " " * 1_000_000 + "x")
    assert_lossless(tokenizer, "x" * 1_000_000 + " ")


def test_a_prefix_is_known_by_its_ranks(rank_file: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.tiktoken"
    short.write_text("\n".join(rank_file.read_text().splitlines()[:260]))
    assert open_file(short).fingerprint == open_file(rank_file, 260).fingerprint
    assert open_file(rank_file, 260).fingerprint != open_file(rank_file, 261).fingerprint


def test_tekken(tekken_file: Path) -> None:
    tokenizer = open_file(tekken_file)
    assert tokenizer.vocab_size == 262, "default_vocab_size less the special tokens"
    assert_lossless(tokenizer, TEXT)
    assert open_file(tekken_file, 269).vocab_size == 269


@pytest.mark.parametrize("vocab", [255, 270, 0, -1])
def test_a_vocabulary_out_of_range_is_refused(rank_file: Path, vocab: int) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"data.tokenizer_vocab={vocab}: must be between 256 and the 269 .*"
        "set data.tokenizer_vocab=269",
    ):
        open_file(rank_file, vocab)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: ["not base64!"], "line 1 is not"),
        (lambda lines: [*lines, "AA== x"], "line 270 is not"),
        (lambda lines: lines[:100], "data.tokenizer_vocab=100: must be between 256"),
        (
            lambda lines: [*lines[:65], f"{base64.b64encode(b'zz').decode()} 65", *lines[66:]],
            "1 of the 256 single bytes",
        ),
        (lambda lines: [*lines, f"{base64.b64encode(b'the').decode()} 269"], "appears twice"),
        (lambda lines: lines[:256] + lines[257:], "set data.tokenizer_vocab=256"),
    ],
)
def test_damaged_rank_files_are_refused(
    rank_file: Path, change: Callable[[list[str]], list[str]], message: str
) -> None:
    rank_file.write_text("\n".join(change(rank_file.read_text().splitlines())))
    with pytest.raises(ConfigError, match=message):
        open_file(rank_file)


def test_a_damaged_tekken_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps({"vocab": []}))
    with pytest.raises(ConfigError, match="it lacks config"):
        open_file(path)


def test_tokenizers_json(tmp_path: Path) -> None:
    tokenizer = open_file(trained_json(tmp_path))
    assert tokenizer.vocab_size == 320
    assert tokenizer.separator == 0, "<|endoftext|> is the separator"
    assert_lossless(tokenizer, TEXT)
    for word in WORDS:
        assert_lossless(tokenizer, word)
    assert tokenizer.token_bytes[:2].tolist() == [0, 0]
    assert len(tokenizer.encode(b" the expert")) < 6, "merges are used"
    assert tokenizer.decode([0, 1]) == ""


def test_a_json_without_an_end_of_text_token_gets_one(tmp_path: Path) -> None:
    body = json.loads(trained_json(tmp_path).read_text())
    body["added_tokens"] = []
    for token in ("<|endoftext|>", "<|pad|>"):
        body["model"]["vocab"][token.replace("|", "!")] = body["model"]["vocab"].pop(token)
    path = tmp_path / "bare.json"
    path.write_text(json.dumps(body))
    tokenizer = open_file(path)
    assert (tokenizer.vocab_size, tokenizer.separator) == (321, 320)
    assert_lossless(tokenizer, TEXT)


def test_truncation_in_the_file_is_ignored(tmp_path: Path) -> None:
    path = trained_json(tmp_path)
    body = json.loads(path.read_text())
    body["truncation"] = {
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
        "direction": "Right",
    }
    path.write_text(json.dumps(body))
    assert_lossless(open_file(path), TEXT * 3)


WORD_PIECE = {
    "type": "WordPiece",
    "unk_token": "u",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 9,
    "vocab": {"u": 0, "a": 1},
}
WORD_LEVEL = {"type": "WordLevel", "unk_token": "u", "vocab": {"u": 0, "\u2581a": 1}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b | {"normalizer": {"type": "Lowercase"}}, "it changes the text"),
        (
            lambda b: b | {"pre_tokenizer": b["pre_tokenizer"] | {"add_prefix_space": True}},
            "it changes the text",
        ),
        (lambda b: b | {"model": b["model"] | {"dropout": 0.1}}, "dropout"),
        (lambda b: b | {"model": WORD_PIECE}, "256 bytes have no token"),
        (lambda b: b | {"model": WORD_LEVEL}, "byte alphabet"),
        (lambda b: {"version": "1.0"}, "cannot read it"),
    ],
)
def test_json_files_that_lose_text_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    path = trained_json(tmp_path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ConfigError, match=rf"must be a lossless byte-level BPE, but .*{message}"):
        open_file(path)


@pytest.mark.parametrize(
    ("name", "vocab", "message"),
    [
        ("gpt2", None, "data.tokenizer=gpt2: must be bytes"),
        ("/nowhere/a.json", None, "must be readable"),
        ("/nowhere/a.tiktoken", None, "must be readable"),
        ("bytes", 300, "data.tokenizer_vocab=300: cannot cut"),
        ("a.json", 300, "data.tokenizer_vocab=300: cannot cut"),
    ],
)
def test_bad_names_are_refused(name: str, vocab: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_file(name, vocab)


@pytest.mark.parametrize("package", ["tiktoken", "tokenizers"])
def test_a_missing_package_is_named(
    rank_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    path = rank_file if package == "tiktoken" else trained_json(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        open_file(path)


def with_normalizer(tmp_path: Path, normalizer: dict[str, Any]) -> Path:
    path = trained_json(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": normalizer}))
    return path


def test_qwens_normalizer_is_dropped_so_that_bytes_are_counted_exactly(tmp_path: Path) -> None:
    """NFC composes e + accent: 3 bytes became 2. The probe held composed characters only, so such a
    file passed, and bits per byte were those of another text."""
    tokenizer = open_file(with_normalizer(tmp_path, {"type": "NFC"}))
    assert tokenizer.name == "trained.json, without its NFC normalizer"
    for text in ("e\u0301", "\u212b and \u1100\u1161"):
        assert_lossless(tokenizer, text)
    assert tokenizer.fingerprint != open_file(trained_json(tmp_path)).fingerprint


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "NFKC"},
        {"type": "NFD"},
        {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
        {"type": "Strip", "strip_left": True, "strip_right": False},
        {"type": "Strip", "strip_left": False, "strip_right": True},
        {"type": "StripAccents"},
    ],
    ids=lambda normalizer: normalizer["type"],
)
def test_other_normalizers_are_refused_at_the_start(
    tmp_path: Path, normalizer: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="must be a lossless byte-level BPE, but it changes"):
        open_file(with_normalizer(tmp_path, normalizer))


def test_a_rule_that_no_probe_meets_is_found_in_the_text(tmp_path: Path) -> None:
    """A normalizer may replace one word only; every text is compared with its tokens."""
    replace = {"type": "Replace", "pattern": {"String": "colour"}, "content": "color"}
    tokenizer = open_file(with_normalizer(tmp_path, replace))
    with pytest.raises(ConfigError, match=r"it changes .* word colour again'"):
        tokenizer.encode(b"the word colour again")


def test_a_word_pattern_with_gaps_is_found_in_the_text(tekken_file: Path) -> None:
    """tiktoken drops what a tekken.json's pattern does not match, here all but letters."""
    body = json.loads(tekken_file.read_text())
    body["config"]["pattern"] = r"\p{L}+"
    tekken_file.write_text(json.dumps(body))
    with pytest.raises(ConfigError, match=r"must keep the text, but it changes 'the end'"):
        open_file(tekken_file).encode(b"the end")


def test_bytes_of_no_text_may_be_missing(tmp_path: Path) -> None:
    """As in SmolLM2's vocabulary: a text that has one is refused, never shortened."""
    path = Path(trained_json(tmp_path))
    content = json.loads(path.read_text())
    alphabet = {byte: letter for letter, byte in byte_alphabet().items()}
    for byte in (4, 0xC0, 0xF5):
        content["model"]["vocab"].pop(alphabet[byte])
    path.write_text(json.dumps(content))
    tokenizer = open_file(path)
    assert_lossless(tokenizer, TEXT)
    with pytest.raises(ConfigError, match="must keep the text"):
        tokenizer.encode(b"a\x04b")
    content["model"]["vocab"].pop(alphabet[ord("~")])
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="1 of the 256 bytes"):
        open_file(path)
