"""Documents to sequences: one stream of tokens, cut every seq_len tokens.

The stream is  sep doc_0 sep doc_1 sep ... doc_n sep.  Sequence i holds tokens i * S .. (i + 1) * S inclusive (S = seq_len): S
inputs and, shifted by one, S targets. Neighbours share one token, so every token up to the end of the last sequence is a
target exactly once, except the separator that opens the stream; the tail that fills no sequence (under S tokens) is left out.

A sequence may span documents, and attention is not cut there: the model sees the separator and learns what it means (GPT-3 does
the same; masking would cost a mask in every attention call). Letters: S seq_len, B sequences, N samples.

The label of a sequence: the domain of the document it starts in, by number.

The token stream is  sep doc_0 sep doc_1 sep ...: a separator opens the document behind it, so a sequence that starts on one belongs to
that document. What is kept is only where the domain changes: corpora come domain by domain, so that is a handful of numbers, and
a label costs one binary search. A sequence that runs over into another domain keeps the label of its start.

Letters: N positions in the stream, U runs of one domain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.data.order import sequence_indices
from dmoe.data.tokenizers import Tokenizer

Runs = tuple[tuple[int, int], ...]
"""(position in the stream, domain) where a domain begins; positions ascend from 0."""

ONE_DOMAIN: Runs = ((0, 0),)


def domain_runs(lengths: Sequence[int], domains: Sequence[str], names: Sequence[str]) -> Runs:
    """Runs of a stream of documents: their lengths in tokens with one separator each, their domains, and all domains in order."""
    assert len(lengths) == len(domains), f"{len(lengths)} documents have {len(domains)} domains"
    runs: list[tuple[int, int]] = []
    position = 0
    for length, domain in zip(lengths, domains, strict=True):
        label = names.index(domain)
        if not runs or runs[-1][1] != label:
            runs.append((position, label))
        position += length
    return tuple(runs) or ONE_DOMAIN


def label_at(position_N: np.ndarray, runs: Runs) -> np.ndarray:
    """int64 [N]: the domain at each position of the stream."""
    begin_U, label_U = np.array(runs, dtype=np.int64).T
    return np.asarray(label_U[np.searchsorted(begin_U, position_N, side="right") - 1])


def count_lengths(chunks: Iterable[np.ndarray], lengths: list[int]) -> Iterator[np.ndarray]:
    """The same chunks; the number of tokens of each is appended to `lengths` as it passes."""
    for chunk in chunks:
        lengths.append(len(chunk))
        yield chunk


def stored_dtype(vocab_size: int) -> np.dtype:
    """The type tokens are kept in, in memory and in shards: little-endian uint16 where the vocabulary fits, else uint32."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def token_chunks(contents: Iterable[bytes], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The token stream of documents, piece by piece: the opening separator, then each document with the separator after it.

    Chunks are one-dimensional arrays of stored_dtype(vocab_size).
    """
    dtype = stored_dtype(tokenizer.vocab_size)
    yield np.array([tokenizer.separator], dtype=dtype)
    for content in contents:
        yield np.append(tokenizer.encode(content), tokenizer.separator).astype(dtype)


def stream_hash(chunks: Iterable[np.ndarray]) -> str:
    """SHA-256 (hex) of a token stream, the same however it is cut into chunks."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(np.ascontiguousarray(chunk).data)
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class PackedStream:
    """Sequences cut from a token stream that lies in one or more arrays (in memory, or memory-mapped shards).

    The arrays are one stream: a sequence may begin in one and end in the next, so the sequences do not depend on how large the
    shards are. `vocab_size` is checked on every read, because a damaged shard must not become an index error inside a model.
    """

    parts: Sequence[np.ndarray]
    seq_len: int
    seed: int
    vocab_size: int
    split: str
    runs: Runs = ONE_DOMAIN
    """Where the domain changes (labels.py)."""

    def __post_init__(self) -> None:
        assert self.seq_len >= 1
        if self.sequences == 0:
            fix = f"set data.seq_len={self.tokens - 1} or less, or use more text"
            if self.tokens < 2:
                fix = "use more text"
            raise ConfigError(
                "data.seq_len",
                self.seq_len,
                f"must be less than the {self.tokens} tokens of the {self.split} split",
                fix,
            )

    @property
    def tokens(self) -> int:
        """Tokens of the stream, separators included."""
        return sum(len(part) for part in self.parts)

    @property
    def sequences(self) -> int:
        """Whole sequences in the stream."""
        return max(0, self.tokens - 1) // self.seq_len

    def batch(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """Samples first .. first + count - 1 of a step in the shuffled order of order.py: int64 [count, seq_len + 1]."""
        return self.windows(
            sequence_indices(step, first, count, global_batch, self.sequences, self.seed)
            * self.seq_len
        )

    def rows(self, first: int, count: int) -> np.ndarray:
        """Sequences first .. first + count - 1 as they are stored, without wrapping around: int64 [count, seq_len + 1]."""
        assert 0 <= first <= first + count <= self.sequences, (
            f"rows {first}+{count} of {self.sequences}"
        )
        return self.windows(np.arange(first, first + count, dtype=np.int64) * self.seq_len)

    def labels(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """The domain each sample of `batch` starts in: int64 [count]."""
        index_B = sequence_indices(step, first, count, global_batch, self.sequences, self.seed)
        return label_at(index_B * self.seq_len, self.runs)

    def row_labels(self, first: int, count: int) -> np.ndarray:
        """The domain each sequence of `rows` starts in: int64 [count]."""
        assert 0 <= first <= first + count <= self.sequences, (
            f"rows {first}+{count} of {self.sequences}"
        )
        return label_at(np.arange(first, first + count, dtype=np.int64) * self.seq_len, self.runs)

    def windows(self, begin_B: np.ndarray) -> np.ndarray:
        """The seq_len + 1 tokens from each position of the stream on: int64 [B, seq_len + 1]."""
        token_BS = np.empty((len(begin_B), self.seq_len + 1), dtype=np.int64)
        starts = np.cumsum([0] + [len(part) for part in self.parts])
        for row, begin in zip(token_BS, begin_B.tolist(), strict=True):
            self._copy(row, begin, starts)
        if token_BS.size and token_BS.max() >= self.vocab_size:
            raise ConfigError(
                "data.source", f"the {self.split} split", f"must hold tokens below {self.vocab_size}, not {token_BS.max()}",
                "the shards are damaged: prepare them again",
            )  # fmt: skip
        return token_BS

    def _copy(self, row_S: np.ndarray, begin: int, starts: np.ndarray) -> None:
        """Fill a row with the tokens from `begin` on, across as many parts as it takes."""
        part = int(np.searchsorted(starts, begin, side="right")) - 1
        done = 0
        while done < len(row_S):
            offset = begin + done - int(starts[part])
            piece = self.parts[part][offset : offset + len(row_S) - done]
            row_S[done : done + len(piece)] = piece
            done += len(piece)
            part += 1


def interleaved(runs: Runs, tokens: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(begin, label): where in a stream of `tokens` tokens each sequence begins, and its domain, in the order above: int64 [N] each."""
    begins, labels = [], []
    for (begin, label), (end, _) in pairwise((*runs, (tokens - 1, -1))):
        # The token at `end` is the separator that closes the run: the last sequence's last target.
        begins.append(np.arange(begin, end - seq_len + 1, seq_len, dtype=np.int64))
        labels.append(np.full(len(begins[-1]), label, dtype=np.int64))
    begin_N, label_N = np.concatenate(begins), np.concatenate(labels)
    turn_N = np.empty_like(label_N)
    for label in np.unique(label_N):
        turn_N[label_N == label] = np.arange((label_N == label).sum())
    order_N = np.lexsort((label_N, turn_N))
    return begin_N[order_N], label_N[order_N]


@dataclass(frozen=True, eq=False)
class HeldOutStream:
    """The sequences of a held-out text, interleaved. Memory: 16 bytes a sequence."""

    text: PackedStream
    begin_N: np.ndarray = field(init=False)
    label_N: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        begin_N, label_N = interleaved(self.text.runs, self.text.tokens, self.text.seq_len)
        if not len(begin_N):
            raise ConfigError(
                "data.seq_len", self.seq_len, f"must be less than the tokens of some domain of the {self.text.split} split",
                "use a smaller one, or more text",
            )  # fmt: skip
        object.__setattr__(self, "begin_N", begin_N)
        object.__setattr__(self, "label_N", label_N)

    @property
    def sequences(self) -> int:
        """Sequences of all domains."""
        return len(self.begin_N)

    @property
    def seq_len(self) -> int:
        """Targets of one sequence."""
        return self.text.seq_len

    def rows(self, first: int, count: int) -> np.ndarray:
        """Sequences first .. first + count - 1 of the order above: int64 [count, seq_len + 1]."""
        return self.text.windows(self.begin_N[self._slice(first, count)])

    def row_labels(self, first: int, count: int) -> np.ndarray:
        """The domain of each: int64 [count]."""
        return np.asarray(self.label_N[self._slice(first, count)])

    def batch(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """As for training, shuffled: int64 [count, seq_len + 1]."""
        return self.text.windows(self.begin_N[self._indices(step, first, count, global_batch)])

    def labels(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """The domain of each sequence of `batch`: int64 [count]."""
        return np.asarray(self.label_N[self._indices(step, first, count, global_batch)])

    def _indices(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        return sequence_indices(step, first, count, global_batch, self.sequences, self.text.seed)

    def _slice(self, first: int, count: int) -> slice:
        assert 0 <= first <= first + count <= self.sequences, (
            f"rows {first}+{count} of {self.sequences}"
        )
        return slice(first, first + count)
