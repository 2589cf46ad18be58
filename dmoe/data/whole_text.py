"""Text that is evaluated whole: no part of it is held out for training."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data.corpus import count_files
from dmoe.data.dataset import DatasetSplits, open_data
from dmoe.data.packing import HeldOutDataset, PackedDataset, domain_runs, token_chunks, token_hash
from dmoe.data.shard_index import is_shard_directory
from dmoe.data.sources import read_corpus
from dmoe.data.tokenizers import encoding_notes, open_tokenizer


def open_whole_text(config: DataConfig, seed: int, source: str) -> DatasetSplits:
    """Open a source with all of its documents in the held-out split; `train` is the same text.

    Of shards and synthetic sequences, which are split already, the held-out split.

    Args:
        config: section `data` of a run: its tokenizer and seq_len are used.
        seed: of the run.
        source: as `data.source`.

    Raises:
        ConfigError: on `--data`, if it cannot be read or is shorter than one sequence.
    """
    if source.startswith("synthetic:") or is_shard_directory(source):
        own = replace(config, source=source, eval_source=None, temperature=None)
        return open_data(own, seed)
    tokenizer, corpus = open_tokenizer(config), read_corpus(source, "--data")
    names = tuple(sorted(set(corpus.document_domains)))
    chunks = list(token_chunks(corpus.contents(), tokenizer))
    # The first chunk is the opening separator, which belongs to no document.
    runs = domain_runs([len(chunk) for chunk in chunks[1:]], corpus.document_domains, names)
    tokens = np.concatenate(chunks)
    if len(tokens) <= config.seq_len:
        allowed = f"has {len(tokens):,} tokens, and one sequence takes {config.seq_len + 1:,}"
        raise ConfigError("--data", source, allowed, "name more text")
    packed = PackedDataset([tokens], config.seq_len, seed, tokenizer.vocab_size, "held_out", runs)
    held_out = HeldOutDataset(packed)
    size, files = corpus.num_bytes / 1e6, count_files(len(corpus.documents))
    notes = [*corpus.notes, *encoding_notes(corpus.contents(), tokenizer)]
    head = f"{source}: {files}, {size:.1f} MB, {held_out.num_sequences:,} sequences"
    key = "\0".join([token_hash([tokens]), tokenizer.fingerprint, str(config.seq_len)])
    fingerprint = hashlib.sha256(key.encode()).hexdigest()
    summary = "; ".join([head, *notes])
    return DatasetSplits(packed, held_out, tokenizer, fingerprint, summary, names)
