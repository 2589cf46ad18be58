"""Open the datasets that `data.*` names: both splits, the tokenizer and the domains.

data = open_data(config.data, config.train.seed)
token_BS = data.train.batch(step, first, count, global_batch)      # int64 [count, seq_len + 1]
input_BS, target_BS = token_BS[:, :-1], token_BS[:, 1:]
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.config.plugins import label
from dmoe.config.schema import DataConfig
from dmoe.data.corpus import (
    Corpus,
    Document,
    corpus_of,
)
from dmoe.data.domain_weights import mix_by_weights
from dmoe.data.eval_source import EvalOnlyText, read_eval_only
from dmoe.data.held_out import HeldOutDataset
from dmoe.data.mixture import mix_domains
from dmoe.data.packing import (
    DomainRuns,
    PackedDataset,
    domain_runs,
    token_chunks,
    token_hash,
)
from dmoe.data.shard_index import SPLITS
from dmoe.data.splits import (
    FIELDS,
    Splits,
    read_splits,
    record_fields,
    refuse_fields,
    split_documents,
)
from dmoe.data.synthetic import SyntheticDataset
from dmoe.data.token_dataset import DatasetSplits, TokenDataset
from dmoe.data.token_masks import document_starts
from dmoe.data.token_streams import TokenStreams, prepared_streams
from dmoe.data.tokenizers import Tokenizer, encoding_notes, open_tokenizer


def open_data(config: DataConfig, seed: int) -> DatasetSplits:
    """Open `data.source`: synthetic:KIND, a directory of shards, a file of tokens, or text.

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
    prepared = prepared_streams(config, tokenizer)
    if prepared is not None:
        streams, domains = prepared
        fields = record_fields(config)
        eval_only = read_eval_only(config.eval_source, fields, (), (), tokenizer, domains)
        return _pack(config, seed, tokenizer, streams, eval_only)
    return _open_text(config, seed, tokenizer, read_splits(config))


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
    streams = TokenStreams(
        ([train_N], [held_out_N]),
        (train_runs, held_out_runs),
        (token_hash([train_N]), token_hash([held_out_N])),
        config.holdout,
        "; ".join((origin, *train.notes, *encoding_notes(splits.contents(), tokenizer))),
        (
            document_starts(train_N, tokenizer.separator),
            document_starts(held_out_N, tokenizer.separator),
        ),
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


def _open_synthetic(config: DataConfig, seed: int, tokenizer: Tokenizer) -> DatasetSplits:
    if config.tokenizer != "bytes":
        raise ConfigError(
            "data.tokenizer",
            config.tokenizer,
            f"must be bytes for data.source={config.source}",
            "set data.tokenizer=bytes",
        )
    refuse_fields(
        config, ("temperature", "weights", "eval_source", *FIELDS), f"data.source={config.source}"
    )
    kind = config.source.removeprefix("synthetic:")
    masked = bool(config.document_mask)
    train, held_out = (
        SyntheticDataset(kind, config.seq_len, seed, split, masked) for split in SPLITS
    )
    more = ("documents apart",) if masked else ()
    fingerprint = sha256_of("synthetic", kind, config.seq_len, seed, *more)
    summary = f"{config.source}: endless sequences of {config.seq_len} tokens"
    return DatasetSplits(
        train, held_out, tokenizer, fingerprint, summary, (kind,), document_mask=masked
    )


def _pack(
    config: DataConfig,
    seed: int,
    tokenizer: Tokenizer,
    streams: TokenStreams,
    eval_only: EvalOnlyText,
) -> DatasetSplits:
    """Cut both token streams into sequences."""
    seq_len, vocab_size, domains = config.seq_len, tokenizer.vocab_size, eval_only.domains
    masked = streams.is_masked(config.document_mask)
    packed = PackedDataset(
        streams.arrays[0],
        seq_len,
        seed,
        vocab_size,
        "train",
        streams.runs[0],
        streams.document_starts[0],
        masked,
    )
    arrays, runs = eval_only.append_to(streams.arrays[1], streams.runs[1])
    starts_N = streams.document_starts[1]
    if starts_N is not None and len(eval_only.token_N):
        last = sum(len(array) for array in streams.arrays[1]) - 1
        more_N = document_starts(
            np.append(tokenizer.separator, eval_only.token_N), tokenizer.separator
        )
        starts_N = np.append(starts_N, last + more_N)
    held_out = HeldOutDataset(
        PackedDataset(arrays, seq_len, seed, vocab_size, "held_out", runs, starts_N, masked)
    )
    notes = [
        f"{streams.summary}; {packed.num_tokens + held_out.packed.num_tokens:,} tokens "
        f"({tokenizer.name}, vocabulary {vocab_size:,}); {packed.num_sequences:,} training and "
        f"{held_out.num_sequences:,} held-out sequences of {seq_len}",
        *eval_only.notes,
    ]
    train: TokenDataset = packed
    # The text that is only evaluated may change when a run is resumed; which sequences are drawn
    # may not, so that is part of the fingerprint.
    sampling: tuple[object, ...] = ()
    mixture = None
    if config.weights:
        _refuse_both(config)
        mixture = mix_by_weights(packed, config.weights, domains)
        sampling = ("weights", *mixture.quota_D.tolist())
    elif config.temperature is not None:
        mixture = mix_domains(packed, config.temperature)
        sampling = ("temperature", float(config.temperature))
    if mixture is not None:
        train = mixture
        shares = [f"{domains[label]} {share:.1%}" for label, share in mixture.shares.items()]
        notes.append(f"drawn: {', '.join(shares)}")
    if masked:
        notes.append("documents do not see each other")
        sampling += ("documents apart",)
    missing = [name for label, name in enumerate(domains) if label not in held_out.labels_present]
    if missing:
        notes.append(f"too little held-out text to evaluate {', '.join(missing)}")
    fingerprint = sha256_of(
        "packed", *streams.hashes, tokenizer.fingerprint, seq_len, streams.holdout, *sampling
    )
    return DatasetSplits(
        train,
        held_out,
        tokenizer,
        fingerprint,
        "; ".join(notes),
        domains,
        eval_only.eval_only,
        masked,
    )


def _refuse_both(config: DataConfig) -> None:
    if config.temperature is not None:
        allowed = "says how domains are drawn, and so does data.weights"
        raise ConfigError("data.temperature", config.temperature, allowed, "leave one of them out")


def sha256_of(*parts: object) -> str:
    """Return the SHA-256 (hex) of the parts of a fingerprint."""
    return hashlib.sha256("\0".join(["dmoe data 1", *map(str, parts)]).encode()).hexdigest()
