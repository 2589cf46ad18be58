"""Open the datasets that `data.*` names: both splits, the tokenizer and the domains.

data = open_data(config.data, config.train.seed)
token_BS = data.train.batch(step, first, count, global_batch)      # int64 [count, seq_len + 1]
input_BS, target_BS = token_BS[:, :-1], token_BS[:, 1:]
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.config.plugins import label
from dmoe.config.schema import DataConfig
from dmoe.data.corpus import (
    Corpus,
    Document,
    corpus_of,
    count_files,
)
from dmoe.data.eval_source import EvalOnlyText, read_eval_only
from dmoe.data.mixture import mix_domains
from dmoe.data.packing import (
    DomainRuns,
    HeldOutDataset,
    PackedDataset,
    domain_runs,
    token_chunks,
    token_hash,
)
from dmoe.data.shard_index import SPLITS, is_shard_directory, read_index
from dmoe.data.shards import map_shards
from dmoe.data.splits import (
    FIELDS,
    Splits,
    read_splits,
    record_fields,
    refuse_fields,
    split_documents,
)
from dmoe.data.synthetic import SyntheticDataset
from dmoe.data.tokenizers import Tokenizer, encoding_notes, open_tokenizer


class TokenDataset(Protocol):
    """Sequences of seq_len + 1 tokens: seq_len inputs and, shifted by one, seq_len targets."""

    @property
    def num_sequences(self) -> int | None:
        """Number of different sequences; None if the dataset is endless."""

    @property
    def seq_len(self) -> int:
        """Targets per sequence."""

    def batch(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """Return consecutive samples of one step, in shuffled order, epoch after epoch.

        A function of its arguments and the seed alone: ranks read disjoint ranges of the same
        global batch.

        Args:
            step: optimizer step, from 0.
            first: index of the first sample in the global batch.
            count: number of samples.
            global_batch: samples per step, over all ranks.

        Returns:
            int64 [count, seq_len + 1].
        """

    def labels(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        """Return the label of each sample of `batch`: int64 [count].

        A label is an index into `DatasetSplits.domains`: the domain of the document in which the
        sequence starts. Arguments as in `batch`.
        """

    def samples(self, first: int, count: int) -> np.ndarray:
        """Return sequences first .. first + count - 1 for evaluation: int64 [count, seq_len + 1].

        In stored order; held-out sequences alternate between the domains. Never wraps: the caller
        keeps first + count within `num_sequences` (an assertion).
        """

    def sample_labels(self, first: int, count: int) -> np.ndarray:
        """Return the label of each sequence of `samples`: int64 [count]."""


@dataclass(frozen=True)
class DatasetSplits:
    """The training and the held-out dataset of a run, and their tokenizer."""

    train: TokenDataset
    held_out: TokenDataset
    tokenizer: Tokenizer
    fingerprint: str
    """SHA-256 (hex) of the token streams, the tokenizer, seq_len and the hold-out."""
    summary: str
    domains: tuple[str, ...]
    """Domain names by label: those of data.source, sorted, then those that only data.eval_source
    has, sorted."""
    eval_only: tuple[str, ...] = ()
    """Domains that training does not have: the last ones of `domains`."""

    def sequences_per_domain(self) -> dict[str, tuple[int, int]]:
        """Return (training, held-out) sequences by domain; ValueError for endless datasets."""
        if self.train.num_sequences is None or self.held_out.num_sequences is None:
            raise ValueError("an endless dataset has no number of sequences")
        train_D, held_out_D = (
            np.bincount(
                split.sample_labels(0, split.num_sequences or 0), minlength=len(self.domains)
            )
            for split in (self.train, self.held_out)
        )
        return {
            name: (int(train_D[label]), int(held_out_D[label]))
            for label, name in enumerate(self.domains)
        }

    def describe(self) -> str:
        """Return one line: source, files, bytes, tokens, sequences, fingerprint (12 digits)."""
        return f"{self.summary}; fingerprint {self.fingerprint[:12]}"


def open_data(config: DataConfig, seed: int) -> DatasetSplits:
    """Open `data.source`: synthetic:KIND, a directory of shards (with an index.json), or text.

    `seed` decides the order of training sequences, and the content of synthetic ones. Raises
    ConfigError on the field of data.* that cannot work.
    """
    if config.seq_len < 1:
        raise ConfigError(
            "data.seq_len", config.seq_len, "must be at least 1", "set data.seq_len=128"
        )
    tokenizer = open_tokenizer(config)
    if config.source.startswith("synthetic:"):
        return _open_synthetic(config, seed, tokenizer)
    if is_shard_directory(config.source):
        return _open_shards(config, seed, tokenizer)
    return _open_text(config, seed, tokenizer, read_splits(config))


@dataclass(frozen=True)
class _TokenStreams:
    """Token streams of both splits, before they are packed. Pairs are (train, held out)."""

    arrays: tuple[Sequence[np.ndarray], Sequence[np.ndarray]]
    runs: tuple[DomainRuns, DomainRuns]
    hashes: tuple[str, str]
    holdout: float
    summary: str


def open_documents(config: DataConfig, seed: int, texts: Sequence[str | bytes]) -> DatasetSplits:
    """Open documents that are in memory, one text each, as `open_data` opens those of files."""
    contents = [text.encode() if isinstance(text, str) else text for text in texts]
    given = [Document(text, f"document {n}", "given") for n, text in enumerate(contents)]
    corpus = corpus_of(given, "data", f"{len(given)} texts")
    return _open_text(config, seed, open_tokenizer(config), split_documents(corpus, config))


def _open_text(
    config: DataConfig, seed: int, tokenizer: Tokenizer, splits: Splits
) -> DatasetSplits:
    train, held_out = splits.train, splits.held_out
    names = tuple(sorted({*train.document_domains, *held_out.document_domains}))
    train_N, train_runs = _tokenize(train, tokenizer, names)
    held_out_N, held_out_runs = _tokenize(held_out, tokenizer, names)
    origin = f"{label(config.source)}: {splits.describe()}"
    streams = _TokenStreams(
        ([train_N], [held_out_N]),
        (train_runs, held_out_runs),
        (token_hash([train_N]), token_hash([held_out_N])),
        config.holdout,
        "; ".join((origin, *train.notes, *encoding_notes(splits.contents(), tokenizer))),
    )
    eval_only = read_eval_only(
        config.eval_source,
        record_fields(config),
        train.documents,
        held_out.documents,
        tokenizer,
        names,
    )
    return _pack(config, seed, tokenizer, streams, eval_only)


def _tokenize(
    corpus: Corpus, tokenizer: Tokenizer, names: Sequence[str]
) -> tuple[np.ndarray, DomainRuns]:
    chunks = list(token_chunks(corpus.contents(), tokenizer))
    # The first chunk is the opening separator, which belongs to no document.
    runs = domain_runs([len(chunk) for chunk in chunks[1:]], corpus.document_domains, names)
    return np.concatenate(chunks), runs


def _open_shards(config: DataConfig, seed: int, tokenizer: Tokenizer) -> DatasetSplits:
    directory = Path(config.source).expanduser()
    fixed = FIELDS if config.eval_source is None else ("validation_source",)
    refuse_fields(config, fixed, f"the shards in {directory}, which were split when they were made")
    index = read_index(directory)
    if index.tokenizer["fingerprint"] != tokenizer.fingerprint:
        raise ConfigError(
            "data.tokenizer",
            f"{config.tokenizer} ({tokenizer.name})",
            f"must be the tokenizer of the shards in {directory}, {index.tokenizer['name']}",
            "name that one (with the same data.tokenizer_vocab), or prepare the shards again",
        )
    train, held_out = (index.splits[split] for split in SPLITS)
    arrays = (map_shards(directory, index, "train"), map_shards(directory, index, "held_out"))
    files, size = train.documents + held_out.documents, train.text_bytes + held_out.text_bytes
    count = len(arrays[0]) + len(arrays[1])
    summary = (
        f"{directory}: {count_files(files)}, {size / 1e6:.1f} MB in {count} shards, "
        f"holdout {index.holdout}"
    )
    if config.holdout not in (index.holdout, DataConfig.holdout):
        summary += f" (of the shards; data.holdout={config.holdout:g} is not used)"
    summary = "; ".join((summary, *index.notes))
    streams = _TokenStreams(
        arrays,
        (train.runs, held_out.runs),
        (train.sha256, held_out.sha256),
        # The split was made when the shards were written, so data.holdout is not used.
        index.holdout,
        summary,
    )
    eval_only = read_eval_only(
        config.eval_source, record_fields(config), (), (), tokenizer, index.domains
    )
    return _pack(config, seed, tokenizer, streams, eval_only)


def _open_synthetic(config: DataConfig, seed: int, tokenizer: Tokenizer) -> DatasetSplits:
    if config.tokenizer != "bytes":
        raise ConfigError(
            "data.tokenizer",
            config.tokenizer,
            f"must be bytes for data.source={config.source}",
            "set data.tokenizer=bytes",
        )
    refuse_fields(config, ("temperature", "eval_source", *FIELDS), f"data.source={config.source}")
    kind = config.source.removeprefix("synthetic:")
    train, held_out = (SyntheticDataset(kind, config.seq_len, seed, split) for split in SPLITS)
    fingerprint = _sha256("synthetic", kind, config.seq_len, seed)
    summary = f"{config.source}: endless sequences of {config.seq_len} tokens"
    return DatasetSplits(train, held_out, tokenizer, fingerprint, summary, (kind,))


def _pack(
    config: DataConfig,
    seed: int,
    tokenizer: Tokenizer,
    streams: _TokenStreams,
    eval_only: EvalOnlyText,
) -> DatasetSplits:
    """Cut both token streams into sequences."""
    seq_len, vocab_size, domains = config.seq_len, tokenizer.vocab_size, eval_only.domains
    packed = PackedDataset(streams.arrays[0], seq_len, seed, vocab_size, "train", streams.runs[0])
    arrays, runs = eval_only.append_to(streams.arrays[1], streams.runs[1])
    held_out = HeldOutDataset(PackedDataset(arrays, seq_len, seed, vocab_size, "held_out", runs))
    notes = [
        f"{streams.summary}; {packed.num_tokens + held_out.packed.num_tokens:,} tokens "
        f"({tokenizer.name}, vocabulary {vocab_size:,}); {packed.num_sequences:,} training and "
        f"{held_out.num_sequences:,} held-out sequences of {seq_len}",
        *eval_only.notes,
    ]
    train: TokenDataset = packed
    # The text that is only evaluated may change when a run is resumed; which sequences are drawn
    # may not, so the temperature is part of the fingerprint.
    sampling: tuple[object, ...] = ()
    if config.temperature is not None:
        train = mixture = mix_domains(packed, config.temperature)
        shares = [f"{domains[label]} {share:.1%}" for label, share in mixture.shares.items()]
        notes.append(f"drawn: {', '.join(shares)}")
        sampling = ("temperature", float(config.temperature))
    missing = [name for label, name in enumerate(domains) if label not in held_out.label_N]
    if missing:
        notes.append(f"too little held-out text to evaluate {', '.join(missing)}")
    fingerprint = _sha256(
        "packed", *streams.hashes, tokenizer.fingerprint, seq_len, streams.holdout, *sampling
    )
    return DatasetSplits(
        train, held_out, tokenizer, fingerprint, "; ".join(notes), domains, eval_only.eval_only
    )


def _sha256(*parts: object) -> str:
    return hashlib.sha256("\0".join(["dmoe data 1", *map(str, parts)]).encode()).hexdigest()
