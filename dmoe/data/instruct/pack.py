"""Conversations to sequences: several in one, apart from each other, or one with padding.

A sequence has S places. A conversation is never cut in two: it takes n of them, and what is left at
the end of a sequence is padding. Several conversations are put into one sequence by best fit,
longest first (Johnson 1973: at most 11/9 of the fewest sequences, and one more). Domains do not
share a sequence. The sequences are a token stream of S tokens each and one token more, so
`PackedDataset` reads them.

Letters: S seq_len, N tokens of the stream.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.data.instruct.encode import Encoded
from dmoe.data.packing import DomainRuns
from dmoe.data.sequences.token_masks import ANSWER, GIVEN, PADDING


class Stream(NamedTuple):
    """Sequences of conversations as a token stream."""

    token_N: np.ndarray
    """int64."""
    role_N: np.ndarray
    """uint8: PADDING, GIVEN or ANSWER."""
    document_start_N: np.ndarray
    """int64: where each conversation starts, and the padding behind the last of a sequence."""
    runs: DomainRuns


def cut(encoded: Encoded, seq_len: int, place: str) -> tuple[Encoded, bool]:
    """Return a conversation of at most `seq_len` tokens, and whether it was longer.

    The first token is predicted by none.

    Raises:
        ConfigError: on data.seq_len, if no token of an answer is left.
    """
    token_N, answer_N = encoded.token_N[:seq_len], encoded.answer_N[:seq_len].copy()
    answer_N[:1] = False
    if not answer_N.any():
        later = np.flatnonzero(encoded.answer_N[1:]) + 2
        if not len(later):
            allowed = f"leaves no token of an answer of {place}, which has none behind its first"
            raise ConfigError("data.source", "its text", allowed, "repair or remove it")
        allowed = f"leaves no token of an answer of {place}, whose first is its token {later[0]}"
        fix = f"use {later[0]} or more, or remove that line"
        raise ConfigError("data.seq_len", seq_len, allowed, fix)
    return Encoded(token_N, answer_N), len(encoded.token_N) > seq_len


def best_fit(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Return the conversations of each sequence, by number: longest first, best fit."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []
    """(places left, sequence), ascending."""
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        at = bisect_left(free, (lengths[number], -1))
        if at == len(free):
            rows.append([])
            left, row = seq_len, len(rows) - 1
        else:
            left, row = free.pop(at)
        rows[row].append(number)
        if left > lengths[number]:
            insort(free, (left - lengths[number], row))
    return rows


def pack(
    encoded: Sequence[Encoded],
    domains: Sequence[str],
    names: Sequence[str],
    seq_len: int,
    fill: int,
    *,
    share: bool,
) -> Stream:
    """Put conversations into sequences.

    Args:
        encoded: of at most `seq_len` tokens each.
        domains: of each conversation.
        names: all domains; a label is an index into them.
        seq_len: S.
        fill: token at the places of padding.
        share: several conversations per sequence.
    """
    rows: list[list[int]] = []
    runs: list[tuple[int, int]] = []
    for label, name in enumerate(names):
        own = [n for n, domain in enumerate(domains) if domain == name]
        if not own:
            continue
        runs.append((len(rows) * seq_len, label))
        groups = best_fit([len(encoded[n].token_N) for n in own], seq_len) if share else None
        rows += [[n] for n in own] if groups is None else [[own[n] for n in row] for row in groups]
    token_N = np.full(len(rows) * seq_len + 1, fill, dtype=np.int64)
    role_N = np.full(len(token_N), PADDING, dtype=np.uint8)
    starts: list[int] = []
    for number, row in enumerate(rows):
        place = number * seq_len
        for n in row:
            starts.append(place)
            end = place + len(encoded[n].token_N)
            token_N[place:end] = encoded[n].token_N
            role_N[place:end] = np.where(encoded[n].answer_N, ANSWER, GIVEN)
            place = end
        if place < (number + 1) * seq_len:
            starts.append(place)
    return Stream(token_N, role_N, np.array(starts, dtype=np.int64), tuple(runs))
