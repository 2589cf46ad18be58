"""Shards: a corpus tokenized once, stored on disk and memory-mapped.

A shard directory holds raw little-endian token files and index.json (see shard_index.py). The
shards of a split form one token stream: a sequence may continue in the next shard, so the shard
size changes no sequence, and training from shards reads exactly what training from the same text
reads. index.json is written last and renamed into place, so a directory with one is complete.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data.files import INDEX
from dmoe.data.packing import ONE_DOMAIN, domain_runs, record_lengths, token_chunks, token_dtype
from dmoe.data.shard_index import (
    SPLITS,
    Shard,
    ShardIndex,
    Split,
    damaged_error,
    is_shard_directory,
    read_index,
)
from dmoe.data.splits import read_splits
from dmoe.data.tokenizers import Tokenizer, encoding_notes, open_tokenizer

_BLOCK_BYTES = 2**22
"""Bytes per read when a file is hashed."""


@dataclass(frozen=True)
class SplitContent:
    """One split to be written: its token stream in chunks, and its size as text."""

    chunks: Iterable[np.ndarray]
    """See `packing.token_chunks`."""
    documents: int
    text_bytes: int
    domains: tuple[str, ...] = ()
    """The domain of each document, i.e. of each chunk but the first; empty if unknown."""


def prepare_shards(config: DataConfig, directory: Path, shard_tokens: int = 2**27) -> ShardIndex:
    """Tokenize the text of `data.source` into shards, which give exactly the same sequences."""
    if config.source.startswith("synthetic:") or is_shard_directory(config.source):
        raise ConfigError(
            "data.source",
            config.source,
            "must be text to be prepared",
            "name text files, a glob or stdlib",
        )
    tokenizer = open_tokenizer(config)
    splits = read_splits(config)
    content = {
        name: SplitContent(
            token_chunks(split.contents(), tokenizer),
            documents,
            split.num_bytes,
            split.document_domains,
        )
        for name, split, documents in zip(SPLITS, splits[:2], splits.documents, strict=True)
    }
    notes = (*splits.train.notes, *encoding_notes(splits.contents(), tokenizer))
    return write_shards(directory, tokenizer, config.holdout, content, shard_tokens, notes)


def write_shards(
    directory: Path,
    tokenizer: Tokenizer,
    holdout: float,
    splits: Mapping[str, SplitContent],
    shard_tokens: int = 2**27,
    notes: tuple[str, ...] = (),
) -> ShardIndex:
    """Write both splits as shards, then the index.

    Args:
        directory: created if missing; must be empty.
        tokenizer: of the token streams; recorded in the index.
        holdout: data.holdout of the split; recorded in the index.
        splits: `train` and `held_out`.
        shard_tokens: tokens per shard; the last shard of a split is shorter.
        notes: what was left out or changed; recorded in the index.

    Raises:
        ConfigError: on `directory`, if it is not empty.

    Memory: one shard plus one chunk.
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
    index = ShardIndex(dtype, header, holdout, written, domains, notes)
    temporary = directory / (INDEX + ".partial")
    _write_durably(temporary, index.to_json().encode())
    os.replace(temporary, directory / INDEX)
    return index


def map_shards(directory: Path, index: ShardIndex, split: str) -> list[np.ndarray]:
    """Return the shards of a split as read-only memory maps, in order.

    Raises ConfigError on data.source for a missing, linked or wrong-sized file. Contents are not
    read here; `verify_shards` does that.
    """
    return [
        np.memmap(_checked_file(directory, shard), dtype=index.dtype, mode="r")
        for shard in index.splits[split].shards
    ]


def verify_shards(directory: Path) -> ShardIndex:
    """Read every byte and compare all hashes with the index.

    Raises ConfigError on data.source that names the first file that differs.
    """
    index = read_index(directory)
    for split in index.splits.values():
        split_digest = hashlib.sha256()
        for shard in split.shards:
            digest = hashlib.sha256()
            with _checked_file(directory, shard).open("rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
                    split_digest.update(block)
            if digest.hexdigest() != shard.sha256:
                raise damaged_error(directory, f"the content of {shard.file} has changed (SHA-256)")
        if split_digest.hexdigest() != split.sha256:
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
    split_digest = hashlib.sha256()
    shards = []
    lengths: list[int] = []
    for number, tokens in enumerate(
        _rechunk(record_lengths(content.chunks, lengths), shard_tokens)
    ):
        assert tokens.dtype == dtype, f"chunks of {tokens.dtype} instead of {dtype}"
        data = tokens.tobytes()
        split_digest.update(data)
        file = f"{name}-{number:05d}.bin"
        _write_durably(directory / file, data)
        shards.append(Shard(file, len(tokens), len(data), hashlib.sha256(data).hexdigest()))
    runs = domain_runs(lengths[1:], content.domains, domains) if content.domains else ONE_DOMAIN
    return Split(
        content.documents, content.text_bytes, split_digest.hexdigest(), tuple(shards), runs
    )


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _rechunk(chunks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yield the same tokens in arrays of exactly `size`, the last one shorter."""
    pending: list[np.ndarray] = []
    num_pending = 0
    for chunk in chunks:
        pending.append(chunk)
        num_pending += len(chunk)
        if num_pending >= size:
            joined = np.concatenate(pending)
            complete = num_pending // size * size
            yield from np.split(joined[:complete], range(size, complete, size))
            pending, num_pending = [joined[complete:]], num_pending - complete
    if num_pending:
        yield np.concatenate(pending)
