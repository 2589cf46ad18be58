"""The train / held-out split of documents.

- A document is held out by a hash of its content, never by its position, so adding or removing a
  file moves no other file to the other split. Documents with one `group_key` (translations,
  capitals) are in one split together.
- Of fewer than `FEW` documents the hash could hold out none, or a quarter of the text. There each
  document is cut instead, and its end is held out.
- `data.validation_source` names the held-out documents. One that is in data.source too, or a
  version of it, is left out of training, and that is noted.

Exact duplicates are removed before: no text is in both splits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data.corpus import Corpus, Document, count_documents, own_corpus
from dmoe.data.formats import RecordFields
from dmoe.data.sources import read_corpus

FEW = 50
"""Documents from which on whole ones are held out."""
FIELDS = ("text_field", "label_field", "validation_source")
"""Fields of `data` that are read with text only."""


def record_fields(config: DataConfig, origin: str = "data.source") -> RecordFields:
    """Return the fields of records that a config reads."""
    alone = config.validation_source is None and config.eval_source is None
    return RecordFields(config.text_field, config.label_field, origin, alone)


def refuse_fields(config: DataConfig, names: Sequence[str], source: str) -> None:
    """Refuse fields of `data` that a source does not read. Raises ConfigError on the first."""
    for name in names:
        if (value := getattr(config, name)) not in (None, {}):
            allowed = f"has no meaning for {source}"
            raise ConfigError(f"data.{name}", value, allowed, f"leave data.{name} out")


class Splits(NamedTuple):
    """Both splits of a source."""

    train: Corpus
    """Its notes say what was left out of both splits, and how they were split."""
    held_out: Corpus
    source: Corpus
    """The documents of data.source that are in either, uncut."""
    own_validation: bool = False
    """The held-out documents are those of data.validation_source."""

    @property
    def documents(self) -> tuple[int, int]:
        """Documents of the training and of the held-out split; one that is cut counts once."""
        train, held_out = len(self.train.documents), len(self.held_out.documents)
        return train, held_out if self.own_validation else len(self.source.documents) - train

    def contents(self) -> Iterator[bytes]:
        """Yield the bytes of each document that was read, uncut."""
        yield from self.source.contents()
        if self.own_validation:
            yield from self.held_out.contents()

    def describe(self) -> str:
        """Return files, documents, bytes, and the shares of the domains in training."""
        size, train = self.source.num_bytes, self.train.num_bytes
        shares = ", ".join(
            f"{domain} {num_bytes / train:.0%}"
            for domain, num_bytes in self.train.bytes_per_domain.items()
        )
        described = f"{count_documents(self.source.documents)}, {size / 1e6:.1f} MB"
        return f"{described} ({shares})" if len(self.train.bytes_per_domain) > 1 else described


def read_splits(config: DataConfig) -> Splits:
    """Read `data.source`, and `data.validation_source` if it is given.

    Raises ConfigError on the field of data.* that cannot work.
    """
    corpus = own_corpus(config) or read_corpus(config.source, record_fields(config))
    return split_documents(corpus, config)


def split_documents(corpus: Corpus, config: DataConfig) -> Splits:
    """Split documents as `config` says; see `read_splits`."""
    if config.validation_source is None:
        return Splits(*split_corpus(corpus, config.holdout), corpus)
    source = config.validation_source
    held_out = read_corpus(source, record_fields(config, "data.validation_source"))
    keys = {document.split_key for document in held_out.documents}
    train = tuple(document for document in corpus.documents if document.split_key not in keys)
    if not train:
        raise no_training_error(source)
    count, size = count_documents(held_out.documents), held_out.num_bytes / 1e6
    removed = len(corpus.documents) - len(train)
    found = validation_notes(source, f"{count}, {size:.1f} MB", removed, held_out.notes)
    notes = [*corpus.notes, *found]
    if config.holdout != DataConfig.holdout:
        notes.append(f"data.holdout={config.holdout:g} is not used")
    source_corpus = Corpus(train, tuple(notes))
    return Splits(source_corpus, Corpus(held_out.documents), source_corpus, own_validation=True)


def holdout_hash(key: bytes) -> float:
    """Hash a split key to [0, 1): the document is held out if this is less than data.holdout."""
    # Salted, so that the split is independent of any other use of a file's SHA-256.
    return int.from_bytes(hashlib.sha256(b"dmoe holdout\0" + key).digest()[:8], "big") / 2**64


def split_corpus(corpus: Corpus, holdout: float) -> tuple[Corpus, Corpus]:
    """Split a corpus into (train, held out).

    Of fewer than `FEW` documents the last `holdout` share of each is held out, and a note says so.
    Raises ConfigError on data.holdout: not between 0 and 1, or one split would be empty.
    """
    check_holdout(holdout)
    if len(corpus.documents) < FEW:
        return _cut_documents(corpus, holdout)
    fractions = [holdout_hash(document.split_key) for document in corpus.documents]
    train = tuple(d for d, f in zip(corpus.documents, fractions, strict=True) if f >= holdout)
    held_out = tuple(d for d, f in zip(corpus.documents, fractions, strict=True) if f < holdout)
    check_both_splits(holdout, len(train), len(held_out), (min(fractions), max(fractions)))
    return Corpus(train, corpus.notes), Corpus(held_out)


def _cut_documents(corpus: Corpus, holdout: float) -> tuple[Corpus, Corpus]:
    train, held_out = list[Document](), list[Document]()
    for document in corpus.documents:
        content = document.content
        cut = cut_position(content, holdout)
        key = document.split_key
        # A document that is too short to be cut is trained on whole.
        train.append(replace(document, content=content[:cut], group_key=key))
        if cut < len(content):
            held_out.append(replace(document, content=content[cut:], group_key=key))
    count = len(corpus.documents)
    longest = max(len(document.content) for document in corpus.documents)
    check_some_cut(holdout, len(held_out), count, longest)
    note = cut_note(count, holdout)
    return Corpus(tuple(train), (*corpus.notes, note)), Corpus(tuple(held_out))


def cut_position(content: Sequence[int], holdout: float) -> int:
    """Return where the end of a document that is held out begins: never inside a character.

    The length of the document if it is too short for two parts.
    """
    cut = round(len(content) * (1 - holdout))
    # UTF-8 continuation bytes are 10xxxxxx, three of them at most.
    for _ in range(3):
        if 0 < cut < len(content) and content[cut] & 0xC0 == 0x80:
            cut -= 1
    return cut if 0 < cut < len(content) else len(content)


def check_holdout(holdout: float) -> None:
    """Raise ConfigError on data.holdout if it is not between 0 and 1."""
    if not 0 < holdout < 1:
        raise ConfigError(
            "data.holdout",
            holdout,
            "must be greater than 0 and less than 1",
            "set data.holdout=0.05",
        )


def check_both_splits(
    holdout: float, train: int, held_out: int, fractions: tuple[float, float]
) -> None:
    """Raise ConfigError on data.holdout if one split has no documents.

    Args:
        holdout: data.holdout.
        train: documents to train on.
        held_out: documents that are held out.
        fractions: smallest and largest hash of all.
    """
    if not held_out:
        enough = math.ceil(fractions[0] * 1e4 + 1) / 1e4
        fix = f"set data.holdout={enough:.4f}" if enough < 1 else "add more files"
        raise _empty_split_error(holdout, "no", train, fix)
    if not train:
        fix = f"set data.holdout={fractions[1] * 0.999:.4f}"
        raise _empty_split_error(holdout, "every", held_out, fix)


def check_some_cut(holdout: float, cut: int, count: int, longest: int) -> None:
    """Raise ConfigError on data.holdout if none of `count` documents is long enough to be cut."""
    if not cut:
        which = "the single document" if count == 1 else f"one of {count} documents"
        raise ConfigError(
            "data.holdout",
            holdout,
            f"must cut {which} of {longest} bytes{' at most' * (count > 1)} in two",
            "use a longer text or a share nearer to 0.5",
        )


def no_training_error(source: str) -> ConfigError:
    """Return the error of a data.validation_source that holds all documents."""
    allowed = "holds every document of data.source, and leaves none for training"
    fix = "name other files, or leave it out"
    return ConfigError("data.validation_source", source, allowed, fix)


def cut_note(count: int, holdout: float) -> str:
    """Say that the end of each of few documents is held out."""
    if count == 1:
        return f"one document: its last {holdout:.2%} held out"
    return f"{count} documents, fewer than {FEW}: the last {holdout:.2%} of each held out"


def validation_notes(source: str, size: str, removed: int, notes: Sequence[str] = ()) -> list[str]:
    """Say what data.validation_source holds, and how many of it data.source has too."""
    found = [f"held out: {source}, {size}", *notes]
    if removed:
        found.append(f"documents of data.validation_source left out of training ({removed})")
    return found


def _empty_split_error(holdout: float, which: str, count: int, fix: str) -> ConfigError:
    return ConfigError(
        "data.holdout",
        holdout,
        f"must leave documents to both sides, but by its hash {which} one of {count} is held out",
        f"{fix} or join the documents into one file, whose end is then held out",
    )
