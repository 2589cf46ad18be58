"""The label of a sequence: the domain of the document it starts in, by number.

The token stream is  sep doc_0 sep doc_1 sep ...: a separator opens the document behind it, so a sequence that starts on one belongs to
that document. What is kept is only where the domain changes: corpora come domain by domain, so that is a handful of numbers, and
a label costs one binary search. A sequence that runs over into another domain keeps the label of its start.

Letters: N positions in the stream, U runs of one domain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

__all__ = ["ONE_DOMAIN", "Runs", "count_lengths", "domain_runs", "label_at"]

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
