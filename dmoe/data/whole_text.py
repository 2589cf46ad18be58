"""Text that is evaluated whole: no part of it is held out for training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data.corpus import count_files
from dmoe.data.dataset import open_data
from dmoe.data.packing import PackedDataset, domain_runs, token_chunks, token_hash
from dmoe.data.sequences.held_out import HeldOutDataset
from dmoe.data.sequences.streams import fingerprint_of
from dmoe.data.sequences.token_dataset import DatasetSplits
from dmoe.data.sequences.token_masks import document_starts
from dmoe.data.shard_index import is_shard_directory
from dmoe.data.sources import read_corpus
from dmoe.data.splits import record_fields
from dmoe.data.token_files import is_token_file
from dmoe.data.tokenizers import encoding_notes, open_tokenizer

FIELD = "--data"
"""What messages call the source."""


def open_whole_text(config: DataConfig, seed: int, source: str) -> DatasetSplits:
    """Open a source with all of its documents in the held-out split; `train` is the same text.

    Of tokens that were prepared, of synthetic sequences and of conversations, which have splits of
    their own, the held-out split.

    Args:
        config: section `data` of a run; its tokenizer, seq_len and fields of records are used.
        seed: of the run.
        source: as `data.source`.

    Raises:
        ConfigError: on `--data`, if it cannot be read or is shorter than one sequence.
    """
    none: dict[str, Any] = {
        "validation_source": None,
        "eval_source": None,
        "temperature": None,
        "weights": {},
    }
    own = replace(config, source=source, **none)
    is_split = source.startswith("synthetic:") or is_shard_directory(source)
    if is_split or is_token_file(source) or config.format == "instruct":
        return open_data(own, seed)
    tokenizer, corpus = open_tokenizer(config), read_corpus(source, record_fields(own, FIELD))
    names = tuple(sorted(set(corpus.document_domains)))
    chunks = list(token_chunks(corpus.contents(), tokenizer))
    # The first chunk is the opening separator, which belongs to no document.
    runs = domain_runs([len(chunk) for chunk in chunks[1:]], corpus.document_domains, names)
    tokens = np.concatenate(chunks)
    if len(tokens) <= config.seq_len:
        allowed = f"has {len(tokens):,} tokens, and one sequence takes {config.seq_len + 1:,}"
        raise ConfigError(FIELD, source, allowed, "name more text")
    is_masked = bool(config.document_mask)
    packed = PackedDataset(
        [tokens],
        config.seq_len,
        seed,
        tokenizer.vocab_size,
        "held_out",
        runs,
        document_starts(tokens, tokenizer.separator),
        is_masked,
    )
    held_out = HeldOutDataset(packed)
    size, files = corpus.num_bytes / 1e6, count_files(len(corpus.documents))
    head = f"{source}: {files}, {size:.1f} MB, {held_out.num_sequences:,} sequences"
    notes = [head, *corpus.notes, *encoding_notes(corpus.contents(), tokenizer)]
    digest = fingerprint_of(token_hash([tokens]), tokenizer.fingerprint, config.seq_len, is_masked)
    return DatasetSplits(
        packed, held_out, tokenizer, digest, "; ".join(notes), names, document_mask=is_masked
    )
