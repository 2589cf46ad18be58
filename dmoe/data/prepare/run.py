"""Prepare a corpus once: text becomes shards that every rank maps, in constant memory.

    read (one process)         encode (N processes)        join (this process)
    documents, no duplicates ->  parts/0000000.part   ->   train-00000.bin ... index.json

An interrupted run leaves `parts/`. The same command then goes on: it reads the source again, but
encodes only the parts that are missing. index.json is written last, so a directory with one is
complete. Memory: `docs/data_prepare.md`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmoe.config.errors import ConfigError
from dmoe.config.plugins import label
from dmoe.config.schema import DataConfig
from dmoe.data.files import INDEX, PARTS, PLAN
from dmoe.data.packing import token_dtype
from dmoe.data.prepare.collect import Collector
from dmoe.data.prepare.cutting import PIECE
from dmoe.data.prepare.part_file import PartFile, write_file
from dmoe.data.prepare.parts import PART, PartReader
from dmoe.data.prepare.source import Source
from dmoe.data.prepare.worker import part_path
from dmoe.data.prepare.workers import Encoder, InProcess, WorkerPool, unwritable
from dmoe.data.shard_index import ShardIndex, is_shard_directory
from dmoe.data.splits import cut_note, validation_notes
from dmoe.data.tokenizers import Tokenizer, damaged_note, nul_note, open_tokenizer

_VERSION = 1


@dataclass(frozen=True)
class Progress:
    """State of a preparation, after each part."""

    done: int
    """Bytes of the source that are in finished parts, about."""
    total: int | None
    """Bytes of the source, as stored; None if unknown."""
    parts: int
    kept: int
    """Parts that an earlier run had completed."""
    finished: bool = False


def prepare_shards(
    config: DataConfig,
    directory: Path,
    shard_tokens: int = 2**27,
    *,
    workers: int = 1,
    part_bytes: int = PART,
    piece_bytes: int = PIECE,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> ShardIndex:
    """Encode the text of `data.source` into shards, which give exactly the same sequences.

    Args:
        config: source, its fields, tokenizer and hold-out.
        directory: created if missing; empty, or left by an interrupted run of the same settings.
        shard_tokens: tokens per shard; the last one of a split is shorter.
        workers: processes that encode; with 1, this one. Any number gives the same files.
        part_bytes: text that is encoded, and after a kill encoded again, together.
        piece_bytes: text that is given to the tokenizer at a time (`cutting.py`).
        on_progress: called after every part.

    Returns:
        The index that was written.

    Raises:
        ConfigError: what cannot be read or written, a directory of something else, a worker that
            died. Complete parts are kept.
    """
    assert min(shard_tokens, workers, part_bytes, piece_bytes) > 0
    tokenizer = open_tokenizer(config)
    source = Source(config, tokenizer)
    settings = _settings(config, tokenizer, shard_tokens, part_bytes, piece_bytes)
    try:
        with _claimed(directory, settings) as parts:
            reader = PartReader(source, tokenizer, config.holdout, part_bytes, piece_bytes)
            index = _prepare(config, reader, directory, parts, shard_tokens, workers, on_progress)
            write_file(directory / INDEX, index.to_json().encode())
            shutil.rmtree(parts)
    except OSError as error:
        raise unwritable(directory, error) from error
    return index


def _prepare(
    config: DataConfig,
    reader: PartReader,
    directory: Path,
    parts: Path,
    shard_tokens: int,
    workers: int,
    on_progress: Callable[[Progress], None],
) -> ShardIndex:
    tokenizer, dtype = reader.tokenizer, token_dtype(reader.tokenizer.vocab_size)
    collector = Collector(directory, dtype, shard_tokens)
    encoder: Encoder = InProcess(tokenizer, parts)
    read = list[int]()
    collected = kept = 0

    def collect() -> None:
        nonlocal collected
        while collected < len(read) and part_path(parts, collected).is_file():
            collector.add(part_path(parts, collected))
            collected += 1
            done = read[collected - 1]
            on_progress(Progress(done, reader.source.total, collected, kept))

    try:
        if workers > 1:
            encoder = WorkerPool(config, parts, workers)
        for part in reader.parts():
            path = part_path(parts, part.number)
            if not _is_complete(path, part.digest, reader, directory):
                encoder.submit(part)
            else:
                kept += 1
            read.append(part.read)
            collect()
        encoder.finish()
        collect()
        assert collected == len(read)
        if part_path(parts, len(read)).exists():
            raise _changed(reader, directory)
        domains, splits = collector.finish([reader.counts.train, reader.counts.held_out])
    except BaseException:
        collector.discard()
        raise
    finally:
        encoder.close()
    on_progress(Progress(read[-1], reader.source.total, collected, kept, finished=True))
    return ShardIndex(
        dtype, _header(tokenizer), config.holdout, splits, domains, _notes(reader, collector)
    )


def _is_complete(path: Path, digest: str, reader: PartReader, directory: Path) -> bool:
    """Return whether an earlier run has encoded this part. Raises ConfigError if of other text."""
    try:
        header = PartFile(path, token_dtype(reader.tokenizer.vocab_size)).header
    except FileNotFoundError:
        return False
    except ValueError:
        path.unlink()
        return False
    if header.digest != digest:
        raise _changed(reader, directory)
    return True


def _changed(reader: PartReader, directory: Path) -> ConfigError:
    """Return the error for parts, of an earlier run, of text that the source does not have now."""
    allowed = f"holds an unfinished preparation of other text: {reader.source.label} has changed"
    return ConfigError("--out", directory, allowed, "remove it, and start again")


@contextmanager
def _claimed(directory: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """Yield the directory of parts, made or left by an interrupted run, locked for this process."""
    parts = directory / PARTS
    plan = parts / PLAN
    if directory.exists() and not plan.is_file():
        allowed = "must not exist yet, be empty, or be left by an interrupted dmoe data prepare"
        if not directory.is_dir() or set(os.listdir(directory)) - {PARTS}:
            if is_shard_directory(str(directory)):
                allowed = f"holds shards already ({INDEX}); {allowed}"
            raise ConfigError("--out", directory, allowed, "name another one, or remove this one")
    parts.mkdir(parents=True, exist_ok=True)
    with (parts / "lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            allowed = "is being prepared by another process"
            raise ConfigError("--out", directory, allowed, "wait for it") from None
        if plan.is_file():
            _check_settings(directory, json.loads(plan.read_text("utf-8")), settings)
        else:
            write_file(plan, (json.dumps(settings, indent=1) + "\n").encode())
        for left in [*parts.glob("*.partial"), *directory.glob("*.bin.partial")]:
            left.unlink()
        try:
            yield parts
        except BaseException:
            if not any(parts.glob("*.part")):  # nothing to go on with
                shutil.rmtree(parts)
                with suppress(OSError):  # it is not empty
                    directory.rmdir()
            raise


def _check_settings(directory: Path, found: dict[str, Any], settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if found.get(name) != value:
            raise ConfigError(
                name,
                value,
                f"is not that of the unfinished preparation in {directory}, {found.get(name)}",
                "use that one, or remove the directory",
            )


def _settings(
    config: DataConfig, tokenizer: Tokenizer, shard_tokens: int, part_bytes: int, piece_bytes: int
) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "data.source": label(config.source),
        "data.tokenizer": f"{tokenizer.name}, {tokenizer.fingerprint[:12]}",
        "data.holdout": config.holdout,
        "shard_tokens": shard_tokens,
        "part_bytes": part_bytes,
        "piece_bytes": piece_bytes,
    }


def _header(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "name": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "separator": tokenizer.separator,
    }


def _notes(reader: PartReader, collector: Collector) -> tuple[str, ...]:
    """Return the notes that `open_data` would give on the text, in the same order."""
    source, counts = reader.source, reader.counts
    notes = list(source.notes)
    if counts.removed:
        of = "documents" if source.has_records else "files"
        notes.append(f"duplicate or empty {of} left out ({counts.removed})")
    if source.has_validation:
        notes += validation_notes(
            str(source.validation_source),
            f"{counts.held_out} documents, {counts.text_bytes / 1e6:.1f} MB",
            counts.in_validation,
        )
    elif reader.are_cut:
        notes.append(cut_note(counts.train, reader.holdout))
    if collector.num_nul:
        notes.append(nul_note(collector.num_nul))
    if collector.num_damaged:
        notes.append(damaged_note(collector.num_damaged))
    return tuple(notes)
