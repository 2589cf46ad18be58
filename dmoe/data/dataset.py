"""From `data.*` to batches: what a trainer needs to know of its data.

data = open_data(config.data, config.train.seed)
token_BS = data.train.batch(step, first, count, global_batch)      # int64 [count, seq_len + 1]
input_BS, target_BS = token_BS[:, :-1], token_BS[:, 1:]
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data.corpus import Corpus, Document, split_corpus
from dmoe.data.mixture import MixtureDataset, mix_domains
from dmoe.data.packing import (
    HeldOutDataset,
    PackedDataset,
    DomainRuns,
    domain_runs,
    token_hash,
    token_chunks,
)
from dmoe.data.shard_index import INDEX, SPLITS, ShardIndex, read_index
from dmoe.data.shards import SplitContent, map_shards, write_shards
from dmoe.data.sources import EvalOnlyText, read_corpus, read_eval_only
from dmoe.data.synthetic import SyntheticDataset
from dmoe.data.tokenizers import Tokenizer, open_tokenizer, decode_utf8


class TokenDataset(Protocol):
    """Sequences of seq_len + 1 tokens: seq_len inputs and, shifted by one, seq_len targets."""

    @property
    def num_sequences(self) -> int | None:
        """How many there are; None if the stream is endless."""

    @property
    def seq_len(self) -> int:
        """Targets of one sequence."""

    def batch(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """Samples first .. first + count - 1 of a step, in the shuffled order, epoch after epoch: int64 [count, seq_len + 1].

        A function of its arguments and the seed alone: ranks ask for disjoint ranges of the same global batch.
        """

    def samples(self, first: int, count: int) -> np.ndarray:
        """Sequences first .. first + count - 1, held-out ones one of each domain in turn: int64 [count, seq_len + 1].

        Never wraps: the caller keeps first + count within `sequences` (an assert).
        """

    def labels(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """For each sequence of `batch`, the index in `Data.domains` of the document it starts in: int64 [count]."""

    def sample_labels(self, first: int, count: int) -> np.ndarray:
        """The same for `rows`: int64 [count]."""


@dataclass(frozen=True)
class DatasetSplits:
    """Both splits, the tokenizer, and a SHA-256 (hex) over the token streams, the tokenizer, seq_len and the hold-out."""

    train: TokenDataset
    held_out: TokenDataset
    tokenizer: Tokenizer
    fingerprint: str
    summary: str
    domains: tuple[str, ...]
    """What the labels number: those of data.source sorted by name, then those that only data.eval_source has, sorted by name."""
    eval_only: tuple[str, ...] = ()
    """The domains that training never sees: the last ones of `domains`."""

    def sequences_per_domain(self) -> dict[str, tuple[int, int]]:
        """For each domain its (training, held-out) sequences. ValueError for endless streams."""
        if self.train.num_sequences is None or self.held_out.num_sequences is None:
            raise ValueError("an endless stream has no number of sequences")
        sides = [
            np.bincount(side.sample_labels(0, side.num_sequences or 0), minlength=len(self.domains))
            for side in (self.train, self.held_out)
        ]
        return {
            name: (int(sides[0][label]), int(sides[1][label]))
            for label, name in enumerate(self.domains)
        }

    def describe(self) -> str:
        """One line: where the data is from, files, bytes, tokens, sequences, the fingerprint's first 12 digits, and remarks."""
        return f"{self.summary}; fingerprint {self.fingerprint[:12]}"


def open_data(config: DataConfig, seed: int) -> DatasetSplits:
    """Open `data.source`: synthetic:KIND, a directory of shards (one with an index.json), or text.

    `seed` decides the order of training sequences (and the content of synthetic ones). Raises ConfigError on the field of
    data.* that cannot work.
    """
    if config.seq_len < 1:
        raise ConfigError(
            "data.seq_len", config.seq_len, "must be at least 1", "set data.seq_len=128"
        )
    tokenizer = open_tokenizer(config)
    if config.source.startswith("synthetic:"):
        return _open_synthetic(config, seed, tokenizer)
    if _is_shard_directory(config.source):
        return _open_shards(config, seed, tokenizer)
    return _open_text(config, seed, tokenizer)


def prepare_shards(config: DataConfig, directory: Path, shard_tokens: int = 2**27) -> ShardIndex:
    """Tokenize the text of `data.source` into a directory of shards that, as `data.source`, gives exactly the same data."""
    if config.source.startswith("synthetic:") or _is_shard_directory(config.source):
        raise ConfigError(
            "data.source",
            config.source,
            "must be text to be prepared",
            "name text files, a glob or stdlib",
        )
    tokenizer = open_tokenizer(config)
    train, held_out = split_corpus(read_corpus(config.source), config.holdout)
    splits = {
        name: SplitContent(
            _chunks(corpus, tokenizer), len(corpus.documents), corpus.num_bytes, _domains(corpus)
        )
        for name, corpus in (("train", train), ("held_out", held_out))
    }
    return write_shards(directory, tokenizer, config.holdout, splits, shard_tokens)


def _open_text(config: DataConfig, seed: int, tokenizer: Tokenizer) -> DatasetSplits:
    train, held_out = split_corpus(read_corpus(config.source), config.holdout)
    names = tuple(sorted({*_domains(train), *_domains(held_out)}))
    chunks = [list(_chunks(side, tokenizer)) for side in (train, held_out)]
    parts = [[np.concatenate(side)] for side in chunks]
    runs = [
        domain_runs([len(chunk) for chunk in side[1:]], _domains(documents), names)
        for side, documents in zip(chunks, (train, held_out), strict=True)
    ]
    documents = (*train.documents, *held_out.documents)
    origin = f"{config.source}: {len(documents)} files, {(train.num_bytes + held_out.num_bytes) / 1e6:.1f} MB"
    if len(train.bytes_per_domain) > 1:
        shares = ", ".join(
            f"{domain} {size / train.num_bytes:.0%}"
            for domain, size in train.bytes_per_domain.items()
        )
        origin += f" ({shares})"
    notes = (*train.notes, *_content_notes(documents, tokenizer))
    hashes = (token_hash(parts[0]), token_hash(parts[1]))
    more = read_eval_only(config.eval_source, train.documents, held_out.documents, tokenizer, names)
    return _packed(
        config,
        seed,
        tokenizer,
        config.holdout,
        parts,
        hashes,
        "; ".join((origin, *notes)),
        runs,
        more,
    )


def _open_shards(config: DataConfig, seed: int, tokenizer: Tokenizer) -> DatasetSplits:
    directory = Path(config.source).expanduser()
    index = read_index(directory)
    if index.tokenizer["fingerprint"] != tokenizer.fingerprint:
        raise ConfigError(
            "data.tokenizer", f"{config.tokenizer} ({tokenizer.name})",
            f"must be the tokenizer the shards in {directory} were made with, {index.tokenizer['name']}",
            "name that one (with the same data.tokenizer_vocab), or prepare the shards again",
        )  # fmt: skip
    parts = [map_shards(directory, index, split) for split in SPLITS]
    hashes = (index.splits["train"].sha256, index.splits["held_out"].sha256)
    size = sum(split.text_bytes for split in index.splits.values()) / 1e6
    files = sum(split.documents for split in index.splits.values())
    count = sum(len(arrays) for arrays in parts)
    # The split was made when the shards were written: their hold-out counts, not data.holdout.
    origin = f"{directory}: {files} files, {size:.1f} MB in {count} shards, holdout {index.holdout}"
    runs = [index.splits[split].runs for split in SPLITS]
    more = read_eval_only(config.eval_source, (), (), tokenizer, index.domains)
    return _packed(config, seed, tokenizer, index.holdout, parts, hashes, origin, runs, more)


def _open_synthetic(config: DataConfig, seed: int, tokenizer: Tokenizer) -> DatasetSplits:
    if config.tokenizer != "bytes":
        raise ConfigError(
            "data.tokenizer",
            config.tokenizer,
            f"must be bytes for data.source={config.source}",
            "set data.tokenizer=bytes",
        )
    for field, value in (
        ("data.eval_source", config.eval_source),
        ("data.temperature", config.temperature),
    ):
        if value is not None:
            raise ConfigError(
                field,
                value,
                f"has no meaning for data.source={config.source}",
                f"leave {field} out",
            )
    kind = config.source.removeprefix("synthetic:")
    train, held_out = (SyntheticDataset(kind, config.seq_len, seed, split) for split in SPLITS)
    fingerprint = _sha256("synthetic", kind, config.seq_len, seed)
    summary = f"{config.source}: endless sequences of {config.seq_len} tokens"
    return DatasetSplits(train, held_out, tokenizer, fingerprint, summary, (kind,))


def _packed(
    config: DataConfig,
    seed: int,
    tokenizer: Tokenizer,
    holdout: float,
    parts: Sequence[Sequence[np.ndarray]],
    hashes: tuple[str, str],
    origin: str,
    runs: Sequence[DomainRuns],
    more: EvalOnlyText,
) -> DatasetSplits:
    train = PackedDataset(parts[0], config.seq_len, seed, tokenizer.vocab_size, "train", runs[0])
    held_parts, held_runs = more.append_to(parts[1], runs[1])
    held_out = HeldOutDataset(
        PackedDataset(held_parts, config.seq_len, seed, tokenizer.vocab_size, "held_out", held_runs)
    )
    stream: PackedDataset | MixtureDataset = (
        train if config.temperature is None else mix_domains(train, config.temperature)
    )
    summary = (
        f"{origin}; {train.num_tokens + held_out.packed.num_tokens:,} tokens ({tokenizer.name}, vocabulary {tokenizer.vocab_size:,}); "
        f"{train.num_sequences:,} training and {held_out.num_sequences:,} held-out sequences of {config.seq_len}"
    )
    unseen = [name for label, name in enumerate(more.domains) if label not in held_out.label_N]
    notes = [summary, *more.notes]
    if isinstance(stream, MixtureDataset):
        notes.append(
            "drawn: "
            + ", ".join(
                f"{more.domains[label]} {share:.1%}" for label, share in stream.shares.items()
            )
        )
    if unseen:
        notes.append(f"too little held-out text to evaluate {', '.join(unseen)}")
    # What is only evaluated may change between a run's parts; which sequences are drawn may not.
    drawing = () if config.temperature is None else ("temperature", float(config.temperature))
    fingerprint = _sha256(
        "packed", *hashes, tokenizer.fingerprint, config.seq_len, holdout, *drawing
    )
    return DatasetSplits(
        stream, held_out, tokenizer, fingerprint, "; ".join(notes), more.domains, more.eval_only
    )


def _chunks(corpus: Corpus, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    return token_chunks((document.content for document in corpus.documents), tokenizer)


def _domains(corpus: Corpus) -> tuple[str, ...]:
    return tuple(document.domain for document in corpus.documents)


def _content_notes(documents: Sequence[Document], tokenizer: Tokenizer) -> list[str]:
    """What encoding changes in the text, so that nothing is lost silently."""
    notes = []
    if removed := sum(document.content.count(0) for document in documents):
        notes.append(f"{removed} NUL bytes removed")
    if tokenizer.name != "bytes":
        damaged = sum("\ufffd" in decode_utf8(document.content) for document in documents)
        if damaged:
            notes.append(
                f"{damaged} files are not UTF-8 or hold U+FFFD (undecodable bytes become U+FFFD)"
            )
    return notes


def _is_shard_directory(source: str) -> bool:
    return Path(source).expanduser().joinpath(INDEX).is_file()


def _sha256(*parts: object) -> str:
    return hashlib.sha256("\0".join(["dmoe data 1", *map(str, parts)]).encode()).hexdigest()
