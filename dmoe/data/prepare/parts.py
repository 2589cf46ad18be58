"""The source as a list of parts: which document goes where, without duplicates, in source order.

A part is a few megabytes of text, cut between documents or, of a long one, between pieces. Which
text is in which part depends on the source and the tokenizer alone, so parts can be encoded by any
number of processes, and after a kill only those are encoded that are missing.

The split is that of `splits.py`: by hash of the content; of fewer than `FEW` documents the end of
each; or the documents of data.validation_source. Whether they are few is known before the first
part: a pass over the source counts up to `FEW` documents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import overload

from dmoe.data.prepare.cutting import PIECE, pieces
from dmoe.data.prepare.documents import Digests, DigestSet, SourceDocument, TokenContent, digest
from dmoe.data.prepare.source import Source
from dmoe.data.splits import (
    FEW,
    check_both_splits,
    check_holdout,
    check_some_cut,
    cut_position,
    no_training_error,
)
from dmoe.data.tokenizers import Tokenizer

PART = 8 << 20
"""Bytes of text per part, at least (but the last)."""


@dataclass(frozen=True)
class Piece:
    """Consecutive bytes of one document."""

    split: int
    """0: train, 1: held out."""
    document: int
    """Number of the document in the source, without duplicates."""
    domain: str
    opens: bool
    """Whether the document begins here."""
    closes: bool
    """Whether the document ends here."""
    is_tokens: bool
    data: bytes


@dataclass(frozen=True)
class Part:
    """Pieces that are encoded together."""

    number: int
    pieces: list[Piece]
    digest: str
    """SHA-256 of the pieces, through the hashes of their documents."""
    read: int
    """Bytes of the source up to the end of this part, about."""


@dataclass
class SplitCounts:
    """Documents of a pass, by what became of them."""

    train: int = 0
    held_out: int = 0
    """Without the ends of documents that are cut."""
    cut: int = 0
    """Documents whose end is held out; they are in `train`."""
    removed: int = 0
    """Documents that are empty or were there before."""
    in_validation: int = 0
    """Documents of data.validation_source, left out of training."""
    text_bytes: int = 0
    """Of the held-out documents of data.validation_source."""


@dataclass
class PartReader:
    """Parts of a source, and after the last one the counts of its documents.

    Memory: one part, and 21 to 32 bytes per document for the hashes that find duplicates.
    """

    source: Source
    tokenizer: Tokenizer
    holdout: float
    part_bytes: int = PART
    piece_bytes: int = PIECE
    counts: SplitCounts = field(default_factory=SplitCounts)
    are_cut: bool = False

    def parts(self) -> Iterator[Part]:
        """Yield the parts in order. Raises ConfigError as `splits.split_documents`."""
        made: list[Piece] = []
        hashed, size, number = hashlib.sha256(), 0, 0
        for piece, content in self._pieces():
            made.append(piece)
            size += len(piece.data)
            about = [piece.split, piece.document, piece.domain, piece.opens, piece.closes]
            hashed.update(json.dumps([*about, len(piece.data)]).encode() + content)
            if size >= self.part_bytes:
                yield Part(number, made, hashed.hexdigest(), self.source.position)
                made, hashed, size, number = [], hashlib.sha256(), 0, number + 1
        if made or number == 0:
            yield Part(number, made, hashed.hexdigest(), self.source.position)

    def _pieces(self) -> Iterator[tuple[Piece, bytes]]:
        """Yield each piece with the SHA-256 of its document's content."""
        check_holdout(self.holdout)
        self.are_cut = not self.source.has_validation and self._is_short()
        for number, (document, found, ranges) in enumerate(self._ranges()):
            for split, start, stop in ranges:
                for piece in self._pieces_of(document, number, split, start, stop):
                    yield piece, found.content

    def _is_short(self) -> bool:
        return sum(1 for _ in islice(self._unique(self.source.documents()), FEW)) < FEW

    def _unique(
        self, documents: Iterable[SourceDocument]
    ) -> Iterator[tuple[SourceDocument, Digests]]:
        seen = DigestSet()
        for document in documents:
            found = digest(document)
            if document.content.size and seen.add(found.content):
                yield document, found
            else:
                self.counts.removed += 1

    def _ranges(self) -> Iterator[tuple[SourceDocument, Digests, list[tuple[int, int, int]]]]:
        """Yield each document with (split, first byte, end) of its one or two ranges."""
        self.counts = SplitCounts()
        if self.source.has_validation:
            yield from self._with_validation()
            return
        fractions, longest = (1.0, 0.0), 0
        for document, found in self._unique(self.source.documents()):
            size = document.content.size
            longest = max(longest, size)
            fractions = min(fractions[0], found.fraction), max(fractions[1], found.fraction)
            if self.are_cut:
                cut = self._cut(document)
                self.counts.train += 1
                self.counts.cut += cut < size
                yield document, found, [(0, 0, cut), (1, cut, size)]
            elif found.fraction < self.holdout:
                self.counts.held_out += 1
                yield document, found, [(1, 0, size)]
            else:
                self.counts.train += 1
                yield document, found, [(0, 0, size)]
        if self.are_cut:
            self.source.refuse_nothing(self.counts.train)
            check_some_cut(self.holdout, self.counts.cut, self.counts.train, longest)
        else:
            check_both_splits(self.holdout, self.counts.train, self.counts.held_out, fractions)

    def _with_validation(
        self,
    ) -> Iterator[tuple[SourceDocument, Digests, list[tuple[int, int, int]]]]:
        keys = DigestSet()
        for document, found in self._unique(self.source.validation()):
            keys.add(found.key)
            self.counts.held_out += 1
            self.counts.text_bytes += document.content.size
            yield document, found, [(1, 0, document.content.size)]
        self.counts.removed = 0  # the source notes its own
        for document, found in self._unique(self.source.documents()):
            if found.key in keys:
                self.counts.in_validation += 1
            else:
                self.counts.train += 1
                yield document, found, [(0, 0, document.content.size)]
        if not self.counts.train:
            raise no_training_error(str(self.source.validation_source))

    def _cut(self, document: SourceDocument) -> int:
        """Return where the held-out end of a document begins."""
        if isinstance(document.content, TokenContent):
            width = document.content.dtype.itemsize
            return round(document.content.size // width * (1 - self.holdout)) * width
        return cut_position(_Bytes(document), self.holdout)

    def _pieces_of(
        self, document: SourceDocument, number: int, split: int, start: int, stop: int
    ) -> Iterator[Piece]:
        made = pieces(document, start, stop, self.tokenizer, self.piece_bytes)
        about = (split, number, document.domain)
        opens, before = True, next(made, None)
        while before is not None:
            after = next(made, None)
            yield Piece(*about, opens, after is None, document.is_tokens, before)
            opens, before = False, after


class _Bytes(Sequence[int]):
    """Bytes of a document, read one at a time."""

    def __init__(self, document: SourceDocument) -> None:
        self._content = document.content

    def __len__(self) -> int:
        return self._content.size

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[int]: ...
    def __getitem__(self, at: int | slice) -> int | Sequence[int]:
        assert isinstance(at, int)
        return next(iter(self._content.read(at, at + 1)))[0]
