"""Cut a long document into pieces whose tokens, one after the other, are those of the whole.

Bytes can be cut anywhere. A byte-pair encoding first splits text into words, and merges within
them; all word patterns in use (GPT-2, cl100k, o200k, Tekken) end a word between a line break and a
character that is no white space, and before a single space. Such a place is used if the text around
it (`WINDOW` bytes on each side) has the same tokens with and without the cut, so a pattern that
crosses it is noticed. A tokenizer without a word pattern, or of the user's own, gets whole
documents, up to `LONGEST` bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.data.prepare.documents import SourceDocument
from dmoe.data.tokenizers import Tokenizer

PIECE = 1 << 18
"""Bytes of text that are encoded together; memory of an encoder is about 200 times that."""
LONGEST = 4 << 20
"""Bytes of a text that cannot be cut."""
WINDOW = 512
_LINE = re.compile(rb"(?<=\n)(?=[^\s/\x80-\xbf])")
_WORD = re.compile(rb"(?<=[a-z,.;]) (?=[A-Za-z])")
_TRIES = 16


def pieces(
    document: SourceDocument, start: int, stop: int, tokenizer: Tokenizer, size: int = PIECE
) -> Iterator[bytes]:
    """Yield the bytes of a document from `start` to `stop` in pieces that are encoded on their own.

    Args:
        document: text, or tokens.
        start: first byte.
        stop: end.
        tokenizer: of the run.
        size: bytes per piece, about; a multiple of 8.

    Raises:
        ConfigError: a text over `LONGEST` bytes has no place for a cut.
    """
    assert size % 8 == 0, "tokens are cut between, not within"
    anywhere = document.is_tokens or tokenizer.name == "bytes"
    pending = b""
    for block in document.content.read(start, stop):
        pending += block
        while len(pending) >= 2 * size:
            cut = size if anywhere else _safe_cut(pending, size, tokenizer)
            if cut == 0:
                break
            yield pending[:cut]
            pending = pending[cut:]
        if len(pending) > max(LONGEST, 4 * size) and not anywhere:
            raise ConfigError(
                "data.source",
                document.name,
                f"has more than {LONGEST >> 20} MiB without a line break or space at which "
                f"{tokenizer.name} could be applied in pieces",
                "use data.tokenizer=bytes, or break the text into lines",
            )
    if pending:
        yield pending


def _safe_cut(data: bytes, size: int, tokenizer: Tokenizer) -> int:
    """Return a place beyond `size` to cut at; 0 if there is none."""
    if not getattr(tokenizer, "splits_words", False):
        return 0
    for pattern in (_LINE, _WORD):
        tried = 0
        for found in pattern.finditer(data, size, len(data) - WINDOW):
            cut = found.start()
            left, right = data[max(0, cut - WINDOW) : cut], data[cut : cut + WINDOW]
            apart = np.concatenate([tokenizer.encode(left), tokenizer.encode(right)])
            if np.array_equal(tokenizer.encode(left + right), apart):
                return cut
            if (tried := tried + 1) == _TRIES:
                break
    return 0
