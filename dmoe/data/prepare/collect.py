"""Join parts, in order, into the shards, the document boundaries and the index of a directory.

Shards have a fixed number of tokens and the parts that they are made of do not show, so any number
of workers, and a run that was killed and resumed, write the same bytes. A resumed run begins after
the last complete shard of each split; it reads those shards once, for the hash of the split.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from contextlib import suppress
from pathlib import Path

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.data.packing import ONE_DOMAIN
from dmoe.data.prepare.part_file import PartFile
from dmoe.data.shard_index import SPLITS, DocumentsFile, Shard, Split

_BLOCK = 1 << 22
MAX_RUNS = 1 << 20
"""Changes of domain along a split; they are in the index, and in every rank's memory."""


class _File:
    """A file under a temporary name, and its hash."""

    def __init__(self, path: Path) -> None:
        self.path, self.size, self.digest = path, 0, hashlib.sha256()
        self._temporary = path.with_name(path.name + ".partial")
        self._file = self._temporary.open("wb")

    def write(self, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array).data
        self.digest.update(data)
        self._file.write(data)
        self.size += array.nbytes

    def finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)

    def discard(self) -> None:
        with suppress(OSError):  # what is buffered may not fit on the disk
            self._file.close()
        self._temporary.unlink(missing_ok=True)


class SplitWriter:
    """Writes the shards and the document boundaries of one split."""

    def __init__(self, directory: Path, name: str, dtype: np.dtype, shard_tokens: int) -> None:
        """Take over the complete shards of an interrupted run."""
        self._directory, self._name, self._dtype = directory, name, dtype
        self._shard_tokens = shard_tokens
        self._digest = hashlib.sha256()
        self._shards: list[Shard] = []
        self._file: _File | None = None
        self._starts: _File | None = None
        self.position = self.documents = self.text_bytes = 0
        self.runs: list[tuple[int, str]] = []
        while (path := self._path()).is_file() and path.stat().st_size == self._shard_bytes:
            self._take_over(path)

    @property
    def finished(self) -> int:
        """Tokens in complete shards."""
        return len(self._shards) * self._shard_tokens

    @property
    def _shard_bytes(self) -> int:
        return self._shard_tokens * self._dtype.itemsize

    def add(self, part: PartFile, split: int) -> None:
        """Append a part's share of this split."""
        share, start = part.header.splits[split], self.position
        for local, domain in share.runs:
            if not self.runs or self.runs[-1][1] != domain:
                self.runs.append((start + local, domain))
        if len(self.runs) > MAX_RUNS:
            raise ConfigError(
                "data.label_field",
                domain,
                f"is one of the domains that change more than {MAX_RUNS:,} times along the source",
                "order the records by label, or leave it out",
            )
        if self._starts is None:
            self._starts = _File(self._directory / f"documents-{self._name}.bin")
        self._starts.write(part.starts(split) + start)
        self.documents += share.documents
        self.text_bytes += share.text_bytes
        self.position += share.tokens
        if self.position > self.finished:
            self._write(part.tokens(split)[max(0, self.finished - start) :])

    def finish(self) -> None:
        """Complete the last shard and the boundaries."""
        if self._file is not None:
            self._complete()
        if self._starts is not None:
            self._starts.finish()

    def discard(self) -> None:
        """Remove what is not complete."""
        for file in (self._file, self._starts):
            if file is not None:
                file.discard()

    def split(self, files: int, domains: tuple[str, ...]) -> Split:
        """Return the entry of the index. `files`: documents of the source in this split."""
        assert self._starts is not None
        runs = tuple((position, domains.index(domain)) for position, domain in self.runs)
        boundaries = DocumentsFile(
            self._starts.path.name, self.documents, self._starts.digest.hexdigest()
        )
        return Split(
            files,
            self.text_bytes,
            self._digest.hexdigest(),
            tuple(self._shards),
            runs or ONE_DOMAIN,
            boundaries,
        )

    def _path(self) -> Path:
        return self._directory / f"{self._name}-{len(self._shards):05d}.bin"

    def _write(self, token_N: np.ndarray) -> None:
        while len(token_N):
            if self._file is None:
                self._file = _File(self._path())
            room = self._shard_tokens - self._file.size // self._dtype.itemsize
            part, token_N = token_N[:room], token_N[room:]
            self._digest.update(np.ascontiguousarray(part).data)
            self._file.write(part)
            if self._file.size == self._shard_bytes:
                self._complete()

    def _complete(self) -> None:
        assert self._file is not None
        file, self._file = self._file, None
        file.finish()
        tokens = file.size // self._dtype.itemsize
        self._shards.append(Shard(file.path.name, tokens, file.size, file.digest.hexdigest()))

    def _take_over(self, path: Path) -> None:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                self._digest.update(block)
        size = self._shard_bytes
        self._shards.append(Shard(path.name, self._shard_tokens, size, digest.hexdigest()))


class Collector:
    """Joins the parts of a directory."""

    def __init__(self, directory: Path, dtype: np.dtype, shard_tokens: int) -> None:
        """Take over what an interrupted run has completed."""
        self.splits = [SplitWriter(directory, name, dtype, shard_tokens) for name in SPLITS]
        self._dtype = dtype
        self._held = deque[tuple[PartFile, list[int]]]()
        self.num_nul = self.num_damaged = 0
        self._last_damaged = -1

    def add(self, path: Path) -> None:
        """Append the next part. Raises OSError where it cannot be written."""
        part = PartFile(path, self._dtype)
        ends = [
            writer.position + share.tokens
            for writer, share in zip(self.splits, part.header.splits, strict=True)
        ]
        if not part.header.has_tokens and any(
            end > writer.finished for writer, end in zip(self.splits, ends, strict=True)
        ):
            raise ConfigError(
                "--out",
                path.parent.parent,
                "has lost a shard since it was begun",
                "remove it, and start again",
            )
        for number, writer in enumerate(self.splits):
            writer.add(part, number)
        self._count_damaged(*part.header.damaged)
        self.num_nul += part.header.num_nul
        self._held.append((part, ends))
        while self._held and self._is_finished(self._held[0][1]):
            self._held.popleft()[0].drop_tokens()

    def finish(self, files: list[int]) -> tuple[tuple[str, ...], dict[str, Split]]:
        """Complete all files; return the domains and the splits of the index."""
        for writer in self.splits:
            writer.finish()
        names = {domain for writer in self.splits for _, domain in writer.runs}
        domains = tuple(sorted(names)) or ("text",)
        splits = zip(SPLITS, self.splits, files, strict=True)
        return domains, {name: writer.split(count, domains) for name, writer, count in splits}

    def discard(self) -> None:
        """Remove what is not complete."""
        for writer in self.splits:
            writer.discard()

    def _is_finished(self, ends: list[int]) -> bool:
        return all(e <= writer.finished for writer, e in zip(self.splits, ends, strict=True))

    def _count_damaged(self, count: int, first: int, last: int) -> None:
        # A document that continues from the last part is counted there.
        self.num_damaged += count - (count > 0 and first == self._last_damaged)
        self._last_damaged = max(self._last_damaged, last)
