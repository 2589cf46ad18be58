"""What prepared shards, a file of tokens, or a source of text hold: counts, lengths, samples.

Shards are not read but for the samples; `verify_shards` reads every byte. Of text, every document
is read, one at a time.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dmoe.config.schema import DataConfig
from dmoe.data.packing import domain_labels
from dmoe.data.prepare.source import Source
from dmoe.data.shard_index import SPLITS, ShardIndex, is_shard_directory, read_index
from dmoe.data.shards import map_documents, map_shards
from dmoe.data.token_files import is_token_file, open_token_file
from dmoe.data.tokenizers import Tokenizer, byte_tokenizer

QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
SAMPLE = 200
"""Tokens, or bytes, of a sample."""
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Sample:
    """The beginning of a document."""

    place: str
    text: str
    """Tokens in decimal notation, if no tokenizer is there to decode them."""


@dataclass
class SplitInfo:
    """One split of shards, or all of a source."""

    documents: int | None
    """None in shards of an older version, and in a stream of tokens without an index."""
    size: int
    """Tokens, or bytes of text."""
    text_bytes: int | None = None
    lengths: list[int] | None = None
    """Quantiles `QUANTILES` of the documents' lengths, in tokens or bytes."""
    domains: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(documents, tokens or bytes) by domain; documents are 0 where they are not known."""
    samples: list[Sample] = field(default_factory=list)


@dataclass
class DataInfo:
    """All that `dmoe data inspect` prints."""

    path: str
    kind: str
    unit: str
    """tokens or bytes."""
    splits: dict[str, SplitInfo]
    about: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def inspect_data(config: DataConfig, tokenizer: Tokenizer | None, num_samples: int) -> DataInfo:
    """Return what `data.source` holds.

    Args:
        config: source and fields of records.
        tokenizer: to decode tokens; None decodes those of bytes only.
        num_samples: documents per split.

    Raises:
        ConfigError: as the reader of the source.
    """
    if is_shard_directory(config.source):
        return _shards(Path(config.source).expanduser(), tokenizer, num_samples)
    if is_token_file(config.source):
        return _tokens(Path(config.source).expanduser(), tokenizer, num_samples)
    return _text(config, num_samples)


def _shards(directory: Path, tokenizer: Tokenizer | None, num_samples: int) -> DataInfo:
    index = read_index(directory)
    if tokenizer is None and index.tokenizer["fingerprint"] == byte_tokenizer().fingerprint:
        tokenizer = byte_tokenizer()
    splits = {name: _split(directory, index, name, tokenizer, num_samples) for name in SPLITS}
    about = {
        "tokenizer": f"{index.tokenizer['name']}, vocabulary {index.tokenizer['vocab_size']:,}",
        "fingerprint": index.tokenizer["fingerprint"],
        "type": index.dtype.name,
        "holdout": index.holdout,
        "shards": sum(len(split.shards) for split in index.splits.values()),
    }
    return DataInfo(str(directory), "shards", "tokens", splits, about, list(index.notes))


def _split(
    directory: Path,
    index: ShardIndex,
    name: str,
    tokenizer: Tokenizer | None,
    num_samples: int,
) -> SplitInfo:
    split, arrays = index.splits[name], map_shards(directory, index, name)
    start_N = map_documents(directory, index, name)
    size = sum(map(len, arrays))
    edges = [*(position for position, _ in split.runs), max(size - 1, 0)]
    of_label = [0] * len(index.domains)
    for (_, label), begin, end in zip(split.runs, edges, edges[1:], strict=False):
        of_label[label] += max(0, end - begin)
    if start_N is None:
        domains = {d: (0, n) for d, n in zip(index.domains, of_label, strict=True)}
        return SplitInfo(None, size, split.text_bytes, None, domains)
    counts = np.zeros(len(index.domains), dtype=np.int64)
    for first in range(0, len(start_N), _BLOCK):
        labels = domain_labels(start_N[first : first + _BLOCK], split.runs)
        counts += np.bincount(labels, minlength=len(counts))
    domains = {d: (int(c), n) for d, c, n in zip(index.domains, counts, of_label, strict=True)}
    # The separator before a document is none of its tokens, and one more ends the stream.
    length_N = np.diff(start_N, append=size - 1) - 1
    samples = []
    for number in _spread(len(start_N), num_samples):
        first, count = int(start_N[number]) + 1, min(SAMPLE, int(length_N[number]))
        tokens = np.concatenate([*_slices(arrays, first, first + count)] or [length_N[:0]])
        samples.append(Sample(f"document {number}", _decoded(tokens, tokenizer)))
    return SplitInfo(len(start_N), size, split.text_bytes, _quantiles(length_N), domains, samples)


def _tokens(path: Path, tokenizer: Tokenizer | None, num_samples: int) -> DataInfo:
    file = open_token_file(path)
    start_N, size = file.start_N, len(file.token_N)
    largest = max(
        int(file.token_N[first : first + _BLOCK].max()) for first in range(0, size, _BLOCK)
    )
    about = {"type": file.token_N.dtype.name, "largest token": largest}
    if start_N is None:
        places = {0: "begin"}
        info = SplitInfo(None, size)
    else:
        length_N = np.diff(start_N, append=size)
        places = {int(start_N[n]): f"document {n}" for n in _spread(len(start_N), num_samples)}
        info = SplitInfo(len(start_N), size, None, _quantiles(length_N))
    info.samples = [
        Sample(place, _decoded(file.token_N[first : first + SAMPLE], tokenizer))
        for first, place in places.items()
    ]
    return DataInfo(str(path), f"{file.kind} tokens", "tokens", {"all": info}, about)


def _text(config: DataConfig, num_samples: int) -> DataInfo:
    source = Source(config, byte_tokenizer())
    sizes, documents, total = array("q"), Counter[str](), Counter[str]()
    samples: list[Sample] = []
    for document in source.documents():
        size = document.content.size
        sizes.append(size)
        documents[document.domain] += 1
        total[document.domain] += size
        if len(samples) < num_samples:
            head = b"".join(document.content.read(0, min(size, SAMPLE)))
            samples.append(Sample(document.name, head.decode("utf-8", "replace")))
    domains = {name: (documents[name], total[name]) for name in sorted(documents)}
    whole = sum(total.values())
    info = SplitInfo(len(sizes), whole, whole, _quantiles(np.array(sizes)), domains, samples)
    return DataInfo(config.source, "text", "bytes", {"all": info}, {}, source.notes)


def _quantiles(length_N: np.ndarray) -> list[int] | None:
    if not len(length_N):
        return None
    found: list[int] = np.quantile(length_N, QUANTILES, method="nearest").astype(int).tolist()
    return found


def _spread(count: int, wanted: int) -> list[int]:
    """Return numbers from 0 to count - 1, the first and evenly spaced others."""
    wanted = min(count, wanted)
    return [count * n // wanted for n in range(wanted)]


def _slices(arrays: list[np.ndarray], first: int, end: int) -> Iterator[np.ndarray]:
    """Yield the tokens from position `first` to `end` of a stream."""
    offset = 0
    for array_N in arrays:
        part = array_N[max(0, first - offset) : max(0, end - offset)]
        if len(part):
            yield part
        offset += len(array_N)


def _decoded(tokens: np.ndarray, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return " ".join(map(str, tokens.tolist()))
    return tokenizer.decode(tokens.tolist())
