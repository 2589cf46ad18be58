"""What is known of the tokens of a sequence besides their ids: documents, answers and padding.

Documents that share a sequence do not see each other: a token attends to its own document only, and
positions restart at each. A position is 0 at the first token of a document, which is its separator,
and at the first token of a sequence, where a document may go on that has begun before.

    position_s = s - max(first positions of documents that are <= s, 0)

Letters: B sequences, S seq_len, N documents.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class TokenMasks(NamedTuple):
    """Positions and masks of the inputs and targets of some sequences; None where all are plain."""

    position_BS: np.ndarray | None = None
    """int64: position of each input in its document. None: a sequence is one document."""
    predicted_BS: np.ndarray | None = None
    """bool: whether the target is predicted. None: all are."""
    valid_BS: np.ndarray | None = None
    """bool: False for inputs that are padding. None: there is none."""


PADDING, GIVEN, ANSWER = 0, 1, 2
"""Roles of a token of a conversation; only answers are predicted."""
NO_MASKS = TokenMasks()
"""Sequences of one document, all of whose tokens are predicted."""


def document_starts(token_N: np.ndarray, separator: int) -> np.ndarray:
    """Return the position of the separator before each document of a token stream: int64 [N].

    A tokenizer never returns the separator inside a text, and the last one closes the stream.
    """
    return np.flatnonzero(token_N == separator)[:-1].astype(np.int64)


def positions_in_documents(
    start_B: np.ndarray, seq_len: int, document_start_N: np.ndarray
) -> np.ndarray:
    """Return the position of each input in its document: int64 [B, S].

    Two binary searches per sequence: the starts may be a memory map of any length.

    Args:
        start_B: where each sequence starts in the token stream.
        seq_len: S.
        document_start_N: see `PackedDataset.document_start_N`.
    """
    starts_BS = np.zeros((len(start_B), seq_len), dtype=bool)
    first_B = np.searchsorted(document_start_N, start_B, side="right")
    last_B = np.searchsorted(document_start_N, start_B + seq_len, side="left")
    for row, (start, first, last) in enumerate(zip(start_B, first_B, last_B, strict=True)):
        starts_BS[row, np.asarray(document_start_N[first:last]) - start] = True
    return positions_after(starts_BS)


def positions_after(starts_BS: np.ndarray) -> np.ndarray:
    """Return the distance of each token to the last start before it, or to the first token."""
    place_S = np.arange(starts_BS.shape[1], dtype=np.int64)
    return place_S - np.maximum.accumulate(np.where(starts_BS, place_S, 0), axis=1)
