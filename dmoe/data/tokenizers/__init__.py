"""Tokenizers: the protocol, the byte tokenizer, and the table of byte strings behind every kind.

All kinds are byte-level: each token represents a fixed byte string, and the strings of a text's
tokens, concatenated, are the text. This makes bits per byte exact. A NUL byte in a text is removed
before encoding; the place of NUL in a byte vocabulary is used for the document separator (kinds
bytes and tiktoken), so a vocabulary of 256 entries really has 256 entries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.config.plugin_loader import construct
from dmoe.config.plugins import label, parse
from dmoe.config.schema import DataConfig
from dmoe.data.files import special_kind

_ALLOWED = "must be bytes, a tokenizers .json file, a .tiktoken rank file or Mistral's tekken.json"
_PROBE = b"def f(x):\n    return x + 1\n"
_REPLACEMENT = "\ufffd".encode()


class Tokenizer(Protocol):
    """Text to token ids and back. Ids are 0 .. vocab_size - 1."""

    @property
    def name(self) -> str:
        """Name for messages: the kind, and the file it was read from."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    def separator(self) -> int:
        """Id between documents; `encode` never returns it."""

    @property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes per token, 0 for special tokens and the separator: int64 [vocab_size]."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that determines the ids."""

    def encode(self, data: bytes) -> np.ndarray:
        """Return the ids of a text without separators: int64 [n]. NUL bytes are removed first."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; special tokens give nothing, invalid UTF-8 gives U+FFFD.

        Never raises.
        """


class SpecialToken(NamedTuple):
    """A token that stands for no text; only a chat template writes it by its name."""

    id: int
    lstrip: bool = False
    """Whether it swallows white space before it."""
    rstrip: bool = False


@dataclass(frozen=True, eq=False)
class ByteLevelTokenizer:
    """A tokenizer defined by the bytes of each token and a function from bytes to ids.

    `pieces[i]` are the bytes of token i, b"" for a special token. `encoder` is called with bytes
    that contain no NUL.
    """

    name: str
    pieces: tuple[bytes, ...]
    separator: int
    fingerprint: str
    encoder: Callable[[bytes], np.ndarray]
    lossless_by_construction: bool = False
    """True: `encode` does not compare the tokens with the text."""
    splits_words: bool = False
    """Whether text is split into words by a pattern before it is merged: then a long text may be
    encoded in pieces (prepare/cutting.py)."""
    special: Mapping[str, SpecialToken] = field(default_factory=dict)
    """Special tokens by name."""
    token_bytes: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        assert self.pieces[self.separator] == b"", "the separator has no bytes"
        object.__setattr__(
            self, "token_bytes", np.array([len(piece) for piece in self.pieces], dtype=np.int64)
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.pieces)

    def encode(self, data: bytes) -> np.ndarray:
        """Return the ids of a text without separators: int64 [n]. NUL bytes are removed first.

        Raises ConfigError on data.tokenizer if the ids do not stand for exactly this text: a file
        may hold a rule (a normalizer, a word pattern with gaps) that no probe at the start meets.
        """
        text = data.replace(b"\0", b"")
        ids = self.encoder(text)
        if self.lossless_by_construction:
            return ids
        kept = b"".join([self.pieces[i] for i in ids.tolist()])
        wanted = decode_utf8(text).encode()
        if kept != wanted:
            pairs = enumerate(zip(wanted, kept, strict=False))
            first = next((i for i, (a, b) in pairs if a != b), min(len(wanted), len(kept)))
            part = wanted[max(0, first - 10) : first + 20].decode("utf-8", "replace")
            raise ConfigError(
                "data.tokenizer",
                self.name,
                f"must keep the text, but it changes {part!r}, so bits per byte would be wrong",
                "use bytes, or a lossless byte-level BPE",
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; invalid UTF-8 and unknown ids give U+FFFD."""
        size = len(self.pieces)
        return b"".join(
            self.pieces[i] if 0 <= i < size else _REPLACEMENT for i in map(int, ids)
        ).decode("utf-8", "replace")


def byte_tokenizer() -> ByteLevelTokenizer:
    """Return the byte tokenizer: 256 ids, separator 0. Text that is not UTF-8 is preserved."""
    return ByteLevelTokenizer(
        name="bytes",
        pieces=(b"", *(bytes([value]) for value in range(1, 256))),
        separator=0,
        fingerprint=hashlib.sha256(b"dmoe bytes tokenizer 1").hexdigest(),
        encoder=lambda data: np.frombuffer(data, dtype=np.uint8).astype(np.int64),
        lossless_by_construction=True,
    )


def open_tokenizer(config: DataConfig) -> Tokenizer:
    """Open the tokenizer that `data.tokenizer` names.

    Raises ConfigError on data.tokenizer (unknown, missing, damaged, or not byte-level) and on
    data.tokenizer_vocab (out of range, or set for a kind whose vocabulary cannot be reduced).
    """
    if parse(config.tokenizer, "data.tokenizer") is not None:
        return _own_tokenizer(config)
    is_rank_file = config.tokenizer.endswith(".tiktoken") or Path(config.tokenizer).name.startswith(
        "tekken"
    )
    if config.tokenizer_vocab is not None and not is_rank_file:
        raise ConfigError(
            "data.tokenizer_vocab",
            config.tokenizer_vocab,
            f"cannot cut the vocabulary of data.tokenizer={config.tokenizer}",
            "set data.tokenizer_vocab=null, or use a tiktoken rank file",
        )
    if config.tokenizer == "bytes":
        return byte_tokenizer()
    if is_rank_file:
        from dmoe.data.tokenizers.tiktoken import open_rank_file

        return open_rank_file(config.tokenizer, config.tokenizer_vocab)
    if config.tokenizer.endswith(".json"):
        from dmoe.data.tokenizers.hf_json import open_tokenizers_json

        return open_tokenizers_json(config.tokenizer)
    raise ConfigError("data.tokenizer", config.tokenizer, _ALLOWED, "name one of these")


def _own_tokenizer(config: DataConfig) -> Tokenizer:
    """Construct the tokenizer of the user's own, and try it on a text.

    Raises ConfigError on data.tokenizer if ids or bytes are not those of the text.
    """
    field = "data.tokenizer"
    needed = ("name", "vocab_size", "separator", "token_bytes", "fingerprint", "encode", "decode")
    tokenizer: Tokenizer = construct(
        config.tokenizer, field, options=config.tokenizer_options, methods=needed
    )
    ids = np.asarray(tokenizer.encode(_PROBE))
    is_valid = ids.dtype.kind in "iu" and ids.size and 0 <= ids.min() <= ids.max()
    if not is_valid or ids.max() >= tokenizer.vocab_size or tokenizer.separator in ids:
        allowed = f"gives ids that are not whole numbers from 0 to {tokenizer.vocab_size - 1}"
    elif int(np.asarray(tokenizer.token_bytes)[ids].sum()) != len(_PROBE):
        allowed = "has token_bytes that do not sum to the bytes of a text: bits per byte are wrong"
    else:
        return tokenizer
    raise ConfigError(field, label(config.tokenizer), allowed, "see docs/plugins.md")


def read_tokenizer_file(path: str) -> bytes:
    """Return the content of a tokenizer file; ConfigError on data.tokenizer if unreadable."""
    kind = special_kind(Path(path).expanduser())
    if kind is not None:
        raise ConfigError(
            "data.tokenizer", path, f"{_ALLOWED}, and this is a {kind}", "name a plain file"
        )
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(
            "data.tokenizer",
            path,
            f"{_ALLOWED}, and the file must be readable ({error.strerror})",
            "check the path",
        ) from error


def decode_utf8(data: bytes) -> str:
    """Decode text for a tokenizer of characters; invalid bytes become U+FFFD (3 bytes each)."""
    return data.decode("utf-8", "replace")


def encoding_notes(contents: Iterable[bytes], tokenizer: Tokenizer) -> list[str]:
    """Describe what encoding changes in the texts, so that nothing is lost silently."""
    num_nul = num_damaged = 0
    for content in contents:
        num_nul += content.count(0)
        num_damaged += tokenizer.name != "bytes" and "\ufffd" in decode_utf8(content)
    notes = [nul_note(num_nul)] if num_nul else []
    return [*notes, damaged_note(num_damaged)] if num_damaged else notes


def nul_note(count: int) -> str:
    """Say how many NUL bytes were removed."""
    return f"NUL bytes removed ({count})"


def damaged_note(count: int) -> str:
    """Say how many files could not be decoded."""
    return (
        f"files that are not UTF-8 or hold U+FFFD ({count}): bytes that cannot be decoded "
        "become U+FFFD"
    )
