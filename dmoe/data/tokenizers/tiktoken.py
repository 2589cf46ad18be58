"""Byte-pair encodings in tiktoken's form: a list of byte strings in the order in which they were merged.

The first n ranks of such a list are themselves a valid encoding for any n that holds the 256 single bytes, because a merge only
needs merges of lower rank. So `data.tokenizer_vocab` cuts a large vocabulary to one that fits a small model.
The separator takes the place of the NUL byte, which is never encoded; vocab_size is exactly the number of ranks kept.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.data.tokenizers import ByteLevelTokenizer, decode_utf8, read_tokenizer_file

_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{_CONTRACTION}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{_CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A .tiktoken file does not hold the pattern that cuts text into words before merging; the name of the file is all there is to
# go by.
_PATTERN_OF = {
    "r50k_base": _WORDS,
    "p50k_base": _WORDS,
    "cl100k_base": _CL100K,
    "o200k_base": _O200K,
}
_LONGEST_RUN = 10_000
_LONG_RUN = re.compile(rf"\s{{{_LONGEST_RUN}}}|\S{{{_LONGEST_RUN}}}")


def open_rank_file(path: str, vocab: int | None) -> ByteLevelTokenizer:
    """A tokenizer from a .tiktoken file (base64 and rank a line) or a tekken.json.

    `vocab` keeps the first so many ranks; None keeps all of a .tiktoken file, and the number a tekken.json declares. A
    .tiktoken file of an unknown name is cut into words like cl100k (its `name` says so): lossless, but the tokens may differ
    from those of the model it belongs to. Raises ConfigError on data.tokenizer and data.tokenizer_vocab.
    """
    content = read_tokenizer_file(path)
    if path.endswith(".tiktoken"):
        stem = Path(path).stem
        split = stem if stem in _PATTERN_OF else "cl100k_base"
        ranks, pattern, default = _parse_tiktoken(path, content), _PATTERN_OF[split], None
    else:
        ranks, pattern, default = _parse_tekken(path, content)
        split = "its own"
    kept = _first_ranks(path, ranks, vocab, default)
    return ByteLevelTokenizer(
        name=f"{Path(path).name} ({len(kept)} ranks, {split} word pattern)",
        pieces=tuple(piece if piece != b"\0" else b"" for piece in kept),
        separator=kept.index(b"\0"),
        fingerprint=_fingerprint(kept, pattern),
        encoder=_encoder(path, kept, pattern),
    )


def _parse_tiktoken(path: str, content: bytes) -> dict[int, bytes]:
    ranks: dict[int, bytes] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[int(rank)] = base64.b64decode(token, validate=True)
        except (ValueError, binascii.Error) as error:
            raise _damaged(path, f"line {number} is not a base64 token and a rank") from error
    return ranks


def _parse_tekken(path: str, content: bytes) -> tuple[dict[int, bytes], str, int]:
    try:
        document: dict[str, Any] = json.loads(content)
        ranks = {
            int(entry["rank"]): base64.b64decode(entry["token_bytes"], validate=True)
            for entry in document["vocab"]
        }
        config = document["config"]
        default = int(config["default_vocab_size"]) - int(config["default_num_special_tokens"])
        return ranks, str(config["pattern"]), default
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(
            path, "it lacks config.pattern, the sizes, or a vocab of rank and token_bytes"
        ) from error


def _first_ranks(
    path: str, ranks: dict[int, bytes], vocab: int | None, default: int | None
) -> list[bytes]:
    """The tokens of rank 0 .. n - 1, after checking that they are an encoding of any text."""
    available = next(rank for rank in range(len(ranks) + 1) if rank not in ranks)
    size = (
        vocab
        if vocab is not None
        else default
        if default is not None
        else max(available, len(ranks))
    )
    if size > available or size < 256:
        raise ConfigError(
            "data.tokenizer_vocab", size, f"must be between 256 and the {available} consecutive ranks that {path} holds",
            f"set data.tokenizer_vocab={available}" if available >= 256 else "use a whole byte-level rank file",
        )  # fmt: skip
    kept = [ranks[rank] for rank in range(size)]
    missing = {bytes([value]) for value in range(256)} - set(kept)
    if missing:
        raise _damaged(
            path, f"{len(missing)} of the 256 single bytes are not among its first {size} ranks"
        )
    if len(set(kept)) != size or b"" in kept:
        raise _damaged(path, "a token is empty or appears twice")
    return kept


def _encoder(path: str, kept: list[bytes], pattern: str) -> Callable[[bytes], np.ndarray]:
    try:
        import tiktoken
    except ImportError as error:
        raise ConfigError(
            "data.tokenizer", path, "needs the package tiktoken", "pip install tiktoken"
        ) from error
    try:
        encoding = tiktoken.Encoding(
            Path(path).name,
            pat_str=pattern,
            mergeable_ranks={piece: i for i, piece in enumerate(kept)},
            special_tokens={},
        )
    except ValueError as error:
        raise _damaged(path, f"tiktoken refuses it ({error})") from error

    def encode(data: bytes) -> np.ndarray:
        return np.array(
            [i for piece in _cut_runs(decode_utf8(data)) for i in encoding.encode_ordinary(piece)],
            dtype=np.int64,
        )

    return encode


def _cut_runs(text: str) -> Iterator[str]:
    """The text, cut inside runs of white space or of anything else that are longer than _LONGEST_RUN characters.

    tiktoken's regular expressions backtrack over such a run and overflow their stack at about a million characters.
    """
    begin = 0
    for run in _LONG_RUN.finditer(text):
        yield text[begin : run.end()]
        begin = run.end()
    yield text[begin:]


def _fingerprint(kept: list[bytes], pattern: str) -> str:
    digest = hashlib.sha256(b"dmoe tiktoken tokenizer 1\0" + pattern.encode() + b"\0")
    for piece in kept:
        digest.update(len(piece).to_bytes(4, "little") + piece)
    return digest.hexdigest()


def _damaged(path: str, reason: str) -> ConfigError:
    return ConfigError(
        "data.tokenizer",
        path,
        f"must be a whole byte-level rank file, but {reason}",
        "get the file again",
    )
