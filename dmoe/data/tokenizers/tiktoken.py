"""Byte-pair encodings in tiktoken's format: a list of byte strings in the order of their merges.

The first n ranks of such a list are a valid encoding for any n that includes the 256 single bytes,
because a merge only needs merges of lower rank. `data.tokenizer_vocab` therefore reduces a large
vocabulary to one that fits a small model. The separator takes the place of the NUL byte, which is
never encoded; vocab_size is exactly the number of ranks kept.
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

# Patterns that split text into words before merging, of tiktoken's encodings.
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A .tiktoken file does not contain its pattern; only the name of the file identifies it.
_PATTERNS = {
    "r50k_base": _GPT2,
    "p50k_base": _GPT2,
    "cl100k_base": _CL100K,
    "o200k_base": _O200K,
}
_LONGEST_RUN = 10_000
_LONG_RUN = re.compile(rf"\s{{{_LONGEST_RUN}}}|\S{{{_LONGEST_RUN}}}")


def open_rank_file(path: str, vocab: int | None) -> ByteLevelTokenizer:
    """Open a .tiktoken file (base64 and rank per line) or a tekken.json.

    `vocab` is the number of ranks kept; None keeps all ranks of a .tiktoken file, and the number
    that a tekken.json declares. For a .tiktoken file of an unknown name, text is split into words
    as in cl100k (its `name` says so): lossless, but the tokens may differ from those of the model
    it belongs to. Raises ConfigError on data.tokenizer and data.tokenizer_vocab.
    """
    content = read_tokenizer_file(path)
    if path.endswith(".tiktoken"):
        stem = Path(path).stem
        split = stem if stem in _PATTERNS else "cl100k_base"
        ranks, pattern, default = _parse_tiktoken(path, content), _PATTERNS[split], None
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
        splits_words=True,
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
    """Return the tokens of rank 0 .. n - 1; check that they can encode any text."""
    available = next(rank for rank in range(len(ranks) + 1) if rank not in ranks)
    size = vocab if vocab is not None else default
    if size is None:
        size = max(available, len(ranks))
    if size > available or size < 256:
        fix = "use a whole byte-level rank file"
        if available >= 256:
            fix = f"set data.tokenizer_vocab={available}"
        raise ConfigError(
            "data.tokenizer_vocab",
            size,
            f"must be between 256 and the {available} consecutive ranks that {path} holds",
            fix,
        )
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
            [
                i
                for piece in _split_long_runs(decode_utf8(data))
                for i in encoding.encode_ordinary(piece)
            ],
            dtype=np.int64,
        )

    return encode


def _split_long_runs(text: str) -> Iterator[str]:
    """Split the text inside runs of white space, or of other characters, over _LONGEST_RUN long.

    tiktoken's regular expressions backtrack over such a run, and their stack overflows at about a
    million characters.
    """
    start = 0
    for run in _LONG_RUN.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


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
