"""Byte-level tokenizers in Hugging Face's tokenizer.json format (GPT-2, Llama 3, Qwen, OLMo, ...).

A byte-level vocabulary writes each byte as a printable character; inverting that alphabet gives the
exact bytes of each token. Other kinds (WordPiece, Unigram, or BPE on the metaspace character)
normalize or pad the text, so their tokens have no fixed bytes and bits per byte would be wrong:
they are refused. Probe texts show at the start whether encoding is lossless, instead of trusting
the settings in the file; after that every text is compared with its tokens (`encode`).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.data.tokenizers import (
    ByteLevelTokenizer,
    SpecialToken,
    decode_utf8,
    read_tokenizer_file,
)

_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>")
_PROBES = (
    " \n white space at both ends \n ",
    "Probe: tabs\t\tand  spaces,\r\n\n    42 x 3.14 _CamelCase_ it's don't "
    "na\u00efve caf\u00e9 Gr\u00f6\u00dfe "
    "\u4e2d\u6587 \u0440\u0443 \u05d0 \U0001f600 \ufb01 \u00a0 "
    "e\u0301 A\u030a \u1100\u1161 \u212b \u2028 \u200b\ufeff \uff21 end ",
)

WITHOUT_TEXT = frozenset({*range(9), 11, 12, *range(14, 32), 0x7F, 0xC0, 0xC1, *range(0xF1, 0x100)})
"""Bytes that a vocabulary may lack, as SmolLM2's lacks 21: control characters, bytes that UTF-8 has
no use for, and the first bytes of planes without text. `encode` refuses a text that has one."""


def byte_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: the byte of each of its 256 printable characters."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    other = [value for value in range(256) if value not in set(printable)]
    return {chr(value): value for value in printable} | {
        chr(256 + i): value for i, value in enumerate(other)
    }


def open_tokenizers_json(path: str) -> ByteLevelTokenizer:
    """Open a byte-level tokenizer.json.

    The separator is the file's end-of-text token, or an additional id after the last if there is
    none. The name of a special token in a text is encoded as text, never as the special token.
    Raises ConfigError on data.tokenizer.
    """
    content = read_tokenizer_file(path)
    tokenizer = _load(path, content)
    without_nfc = _drop_nfc(tokenizer)
    pieces, separator = _pieces(path, tokenizer)

    def encode(data: bytes) -> np.ndarray:
        # "fast": without the offsets of the tokens in the text.
        (found,) = tokenizer.encode_batch_fast([decode_utf8(data)], add_special_tokens=False)
        return np.array(found.ids, dtype=np.int64)

    result = ByteLevelTokenizer(
        name=Path(path).name + (", without its NFC normalizer" if without_nfc else ""),
        pieces=pieces,
        separator=separator,
        fingerprint=hashlib.sha256(
            b"dmoe tokenizers tokenizer 1\0" + b"no NFC\0" * without_nfc + content
        ).hexdigest(),
        encoder=encode,
        splits_words=_splits_words(json.loads(content).get("pre_tokenizer")),
        special=_special(tokenizer),
    )
    try:
        for probe in _PROBES:
            result.encode(probe.encode())
    except ConfigError:
        raise _refused(
            path, "it changes the text it encodes (a normaliser, a prefix space, or another loss)"
        ) from None
    return result


def _drop_nfc(tokenizer: Any) -> bool:
    """Remove a normalizer that only composes characters (Qwen's), and return whether there was one.

    Without it every text is encoded as it is. Text in NFC, which nearly all text is, gets the same
    tokens. Any other normalizer stays, and is refused.
    """
    if repr(tokenizer.normalizer) != "NFC()":
        return False
    tokenizer.normalizer = None
    return True


def _splits_words(body: Any) -> bool:
    """Return whether a pre-tokenizer splits text into words: `ByteLevel` may only rename bytes."""
    if not isinstance(body, dict):
        return False
    if body.get("type") == "Sequence":
        return any(map(_splits_words, body.get("pretokenizers", ())))
    return body.get("type") != "ByteLevel" or body.get("use_regex", True) is True


def _load(path: str, content: bytes) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            "data.tokenizer", path, "needs the package tokenizers", "pip install tokenizers"
        ) from error
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    # The package raises bare Exception on a bad file.
    except Exception as error:
        raise _refused(path, f"the package tokenizers cannot read it ({error})") from error
    if getattr(tokenizer.model, "dropout", None):
        raise _refused(
            path,
            "it asks for dropout of merges, so the same text would give other tokens each time",
        )
    # A file may set truncation to a model's context, padding, or recognition of special tokens in
    # the text. A corpus needs none of them.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _pieces(path: str, tokenizer: Any) -> tuple[tuple[bytes, ...], int]:
    """Return the bytes of each id, b"" for special tokens and unused ids; and the separator."""
    alphabet = byte_alphabet()
    vocab: dict[str, int] = tokenizer.get_vocab(with_added_tokens=False)
    added: dict[int, Any] = tokenizer.get_added_tokens_decoder()
    size = max([*vocab.values(), *added]) + 1
    pieces = [b""] * size
    for token, index in vocab.items():
        if index not in added:
            if not all(character in alphabet for character in token):
                raise _refused(path, f"its token {token!r} is not written in the byte alphabet")
            pieces[index] = bytes(alphabet[character] for character in token)
    missing = [c for c, byte in alphabet.items() if byte not in WITHOUT_TEXT and c not in vocab]
    if missing:
        raise _refused(
            path, f"{len(missing)} of the 256 bytes have no token, so some text would be lost"
        )
    for index, token in added.items():
        if not token.special:
            if token.lstrip or token.rstrip:
                raise _refused(
                    path, f"its added token {token.content!r} swallows the spaces around it"
                )
            pieces[index] = token.content.encode()
    special = {token.content: index for index, token in added.items() if token.special}
    separator = next((special[name] for name in _SEPARATORS if name in special), size)
    return tuple(pieces if separator < size else [*pieces, b""]), separator


def _special(tokenizer: Any) -> dict[str, SpecialToken]:
    added: dict[int, Any] = tokenizer.get_added_tokens_decoder()
    return {
        token.content: SpecialToken(index, token.lstrip, token.rstrip)
        for index, token in added.items()
        if token.special
    }


def _refused(path: str, reason: str) -> ConfigError:
    return ConfigError(
        "data.tokenizer",
        path,
        f"must be a lossless byte-level BPE, but {reason}",
        "use bytes, or train one with initial_alphabet=ByteLevel.alphabet() "
        "and add_prefix_space=False",
    )
