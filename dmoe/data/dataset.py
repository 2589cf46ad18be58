"""Open the datasets that `data.*` names: both splits, the tokenizer and the domains.

data = open_data(config.data, config.train.seed)
token_BS = data.train.batch(step, first, count, global_batch)      # int64 [count, seq_len + 1]
input_BS, target_BS = token_BS[:, :-1], token_BS[:, 1:]
"""

from __future__ import annotations

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
from dmoe.data.eval_source import EvalOnlyText, read_eval_only
from dmoe.data.packing import (
    DomainRuns,
    domain_runs,
    token_chunks,
    token_hash,
)
from dmoe.data.sequences.streams import TokenStreams, fingerprint_of, pack_streams
from dmoe.data.sequences.token_dataset import DatasetSplits
from dmoe.data.sequences.token_masks import document_starts
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
from dmoe.data.token_streams import prepared_streams
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
    if config.format == "instruct":
        return _open_instruct(config, seed, tokenizer)
    prepared = prepared_streams(config, tokenizer)
    if prepared is not None:
        streams, domains = prepared
        fields = record_fields(config)
        eval_only = read_eval_only(config.eval_source, fields, (), (), tokenizer, domains)
        return pack_streams(config, seed, tokenizer, streams, eval_only)
    return _open_text(config, seed, tokenizer, read_splits(config))


def open_documents(config: DataConfig, seed: int, texts: Sequence[str | bytes]) -> DatasetSplits:
    """Open documents that are in memory, one text each, as `open_data` opens those of files."""
    if config.format != "text":
        allowed = "reads conversations from files, and texts are given"
        raise ConfigError("data.format", config.format, allowed, "name a file in data.source")
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
    return pack_streams(config, seed, tokenizer, streams, eval_only)


def _tokenize(
    corpus: Corpus, tokenizer: Tokenizer, names: Sequence[str]
) -> tuple[np.ndarray, DomainRuns]:
    chunks = list(token_chunks(corpus.contents(), tokenizer))
    # The first chunk is the opening separator, which belongs to no document.
    runs = domain_runs([len(chunk) for chunk in chunks[1:]], corpus.document_domains, names)
    return np.concatenate(chunks), runs


def _open_instruct(config: DataConfig, seed: int, tokenizer: Tokenizer) -> DatasetSplits:
    from dmoe.data.instruct import read_instruct

    data = read_instruct(config, tokenizer)
    pair = (data.train, data.held_out)
    streams = TokenStreams(
        ([pair[0].token_N], [pair[1].token_N]),
        (pair[0].runs, pair[1].runs),
        # the roles are part of what is trained on
        (
            token_hash([pair[0].token_N, pair[0].role_N]),
            token_hash([pair[1].token_N, pair[1].role_N]),
        ),
        config.holdout,
        data.summary,
        (pair[0].document_start_N, pair[1].document_start_N),
        masked_by_default=True,
        roles=(pair[0].role_N, pair[1].role_N),
        chat=data.template,
    )
    none = EvalOnlyText(np.zeros(0, dtype=np.int64), (), data.domains, (), ())
    return pack_streams(config, seed, tokenizer, streams, none)


def _open_synthetic(config: DataConfig, seed: int, tokenizer: Tokenizer) -> DatasetSplits:
    if config.tokenizer != "bytes":
        raise ConfigError(
            "data.tokenizer",
            config.tokenizer,
            f"must be bytes for data.source={config.source}",
            "set data.tokenizer=bytes",
        )
    unread = ("temperature", "weights", "eval_source", *FIELDS)
    refuse_fields(config, unread, f"data.source={config.source}")
    kind = config.source.removeprefix("synthetic:")
    instruct = config.format == "instruct"
    masked = instruct if config.document_mask is None else config.document_mask
    train, held_out = (
        SyntheticDataset(kind, config.seq_len, seed, split, masked, instruct) for split in SPLITS
    )
    more: tuple[str, ...] = ("documents apart",) if masked else ()
    more += ("instruct",) if instruct else ()
    fingerprint = fingerprint_of("synthetic", kind, config.seq_len, seed, *more)
    summary = f"{config.source}: endless sequences of {config.seq_len} tokens"
    return DatasetSplits(
        train, held_out, tokenizer, fingerprint, summary, (kind,), document_mask=masked
    )
