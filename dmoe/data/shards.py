"""Token streams on disk: a corpus tokenized once, memory-mapped ever after.

A shard directory holds raw little-endian token files and index.json (see shard_index.py). The shards of a split are one
stream: a sequence may cross from one to the next, so the shard size changes no sequence, and training from shards reads
exactly what training from the same text reads. index.json is written last and renamed into place: a directory that has one is
whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.data.packing import ONE_DOMAIN, record_lengths, domain_runs, token_dtype
from dmoe.data.shard_index import INDEX, SPLITS, Shard, ShardIndex, Split, damaged_error, read_index
from dmoe.data.tokenizers import Tokenizer

_READ = 2**22


@dataclass(frozen=True)
class SplitContent:
    """One split to be written: its token stream in chunks (packing.token_chunks), and its size as text."""

    chunks: Iterable[np.ndarray]
    documents: int
    text_bytes: int
    domains: tuple[str, ...] = ()
    """The domain of each document, i.e. of each chunk but the first; empty if nothing is known of them."""


def write_shards(
    directory: Path,
    tokenizer: Tokenizer,
    holdout: float,
    splits: Mapping[str, SplitContent],
    shard_tokens: int = 2**27,
) -> ShardIndex:
    """Write both splits (train, held_out) as files of `shard_tokens` tokens, the last one shorter, and the index.

    The directory is made if need be and must be empty: a ConfigError on `directory` otherwise. Memory: one shard plus one
    chunk.
    """
    assert set(splits) == set(SPLITS)
    assert shard_tokens > 0
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(
            "directory",
            directory,
            "must not exist yet or be empty",
            "name another one, or remove this one",
        )
    directory.mkdir(parents=True, exist_ok=True)
    header = {
        "name": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "separator": tokenizer.separator,
    }
    dtype = token_dtype(tokenizer.vocab_size)
    domains = tuple(
        sorted({domain for content in splits.values() for domain in content.domains})
    ) or ("text",)
    written = {
        name: _write_split(directory, name, splits[name], dtype, shard_tokens, domains)
        for name in SPLITS
    }
    index = ShardIndex(dtype, header, holdout, written, domains)
    temporary = directory / (INDEX + ".partial")
    _write_durably(temporary, index.to_json().encode())
    os.replace(temporary, directory / INDEX)
    return index


def map_shards(directory: Path, index: ShardIndex, split: str) -> list[np.ndarray]:
    """The shards of a split as read-only memory maps, in order.

    A ConfigError on data.source for a missing, linked or wrong-sized file. Contents are not read here: verify_shards does that.
    """
    return [
        np.memmap(_checked_file(directory, shard), dtype=index.dtype, mode="r")
        for shard in index.splits[split].shards
    ]


def verify_shards(directory: Path) -> ShardIndex:
    """Read everything and compare each hash with the index; a ConfigError on data.source names the first file that differs."""
    index = read_index(directory)
    for split in index.splits.values():
        whole = hashlib.sha256()
        for shard in split.shards:
            digest = hashlib.sha256()
            with _checked_file(directory, shard).open("rb") as file:
                while block := file.read(_READ):
                    digest.update(block)
                    whole.update(block)
            if digest.hexdigest() != shard.sha256:
                raise damaged_error(directory, f"the content of {shard.file} has changed (SHA-256)")
        if whole.hexdigest() != split.sha256:
            raise damaged_error(
                directory, "a split is not what was written (SHA-256 of its stream)"
            )
    return index


def _checked_file(directory: Path, shard: Shard) -> Path:
    path = directory / shard.file
    if path.is_symlink() or not path.is_file():
        raise damaged_error(directory, f"{shard.file} is missing or not a plain file")
    if path.stat().st_size != shard.bytes:
        raise damaged_error(
            directory, f"{shard.file} has {path.stat().st_size} bytes instead of {shard.bytes}"
        )
    return path


def _write_split(
    directory: Path,
    name: str,
    content: SplitContent,
    dtype: np.dtype,
    shard_tokens: int,
    domains: tuple[str, ...],
) -> Split:
    whole = hashlib.sha256()
    shards = []
    lengths: list[int] = []
    for number, tokens in enumerate(
        _regroup(record_lengths(content.chunks, lengths), shard_tokens)
    ):
        assert tokens.dtype == dtype, f"chunks of {tokens.dtype} instead of {dtype}"
        data = tokens.tobytes()
        whole.update(data)
        file = f"{name}-{number:05d}.bin"
        _write_durably(directory / file, data)
        shards.append(Shard(file, len(tokens), len(data), hashlib.sha256(data).hexdigest()))
    runs = domain_runs(lengths[1:], content.domains, domains) if content.domains else ONE_DOMAIN
    return Split(content.documents, content.text_bytes, whole.hexdigest(), tuple(shards), runs)


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _regroup(chunks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same tokens in arrays of exactly `size`, the last one shorter."""
    waiting: list[np.ndarray] = []
    held = 0
    for chunk in chunks:
        waiting.append(chunk)
        held += len(chunk)
        if held >= size:
            joined = np.concatenate(waiting)
            whole = held // size * size
            yield from np.split(joined[:whole], range(size, whole, size))
            waiting, held = [joined[whole:]], held - whole
    if held:
        yield np.concatenate(waiting)
