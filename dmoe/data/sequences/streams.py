"""Token streams of both splits, and the datasets that are made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data.domain_weights import mix_by_weights, refuse_both
from dmoe.data.eval_source import EvalOnlyText
from dmoe.data.mixture import mix_domains
from dmoe.data.packing import DomainRuns, PackedDataset
from dmoe.data.sequences.held_out import HeldOutDataset
from dmoe.data.sequences.token_dataset import DatasetSplits, TokenDataset
from dmoe.data.sequences.token_masks import document_starts
from dmoe.data.tokenizers import Tokenizer

if TYPE_CHECKING:
    from dmoe.data.instruct import ChatTemplate


@dataclass(frozen=True)
class TokenStreams:
    """Token streams of both splits, before they are packed. Pairs are (train, held out)."""

    arrays: tuple[Sequence[np.ndarray], Sequence[np.ndarray]]
    runs: tuple[DomainRuns, DomainRuns]
    hashes: tuple[str, str]
    holdout: float
    summary: str
    document_starts: tuple[np.ndarray | None, np.ndarray | None]
    """See `PackedDataset.document_start_N`."""
    masked_by_default: bool = False
    """Whether `data.document_mask` is on by default: for text that was tokenized before."""
    roles: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
    """See `PackedDataset.role_N`."""
    chat: ChatTemplate | None = None

    def is_masked(self, document_mask: bool | None) -> bool:
        """Return whether documents are not to see each other. Raises ConfigError if unknown."""
        known = all(start_N is not None for start_N in self.document_starts)
        if document_mask and not known:
            allowed = "needs the boundaries of documents, which these tokens come without"
            fix = "prepare them (dmoe data prepare), or leave it out"
            raise ConfigError("data.document_mask", True, allowed, fix)
        return self.masked_by_default and known if document_mask is None else document_mask


def pack_streams(
    config: DataConfig,
    seed: int,
    tokenizer: Tokenizer,
    streams: TokenStreams,
    eval_only: EvalOnlyText,
) -> DatasetSplits:
    """Cut both token streams into sequences."""
    seq_len, vocab_size, domains = config.seq_len, tokenizer.vocab_size, eval_only.domains
    masked = streams.is_masked(config.document_mask)
    refuse_both(config)
    packed = PackedDataset(
        streams.arrays[0],
        seq_len,
        seed,
        vocab_size,
        "train",
        streams.runs[0],
        streams.document_starts[0],
        masked,
        streams.roles[0],
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
        PackedDataset(
            arrays,
            seq_len,
            seed,
            vocab_size,
            "held_out",
            runs,
            starts_N,
            masked,
            streams.roles[1],
        )
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
    fingerprint = fingerprint_of(
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
        streams.chat,
    )


def fingerprint_of(*parts: object) -> str:
    """Return the SHA-256 (hex) of what identifies the data of a run."""
    return hashlib.sha256("\0".join(["dmoe data 1", *map(str, parts)]).encode()).hexdigest()
