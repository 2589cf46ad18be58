"""Token streams that are mapped, not made: shards (prepare/) and files of other programs.

Opening reads an index, no tokens, so a corpus of any size is open at once, and a rank's memory does
not grow with it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data.corpus import count_files
from dmoe.data.packing import ONE_DOMAIN
from dmoe.data.sequences.streams import TokenStreams
from dmoe.data.shard_index import SPLITS, is_shard_directory, read_index, refuse_unfinished
from dmoe.data.shards import map_documents, map_shards
from dmoe.data.splits import FIELDS, check_holdout, refuse_fields
from dmoe.data.token_files import TokenFile, is_token_file, open_token_file
from dmoe.data.tokenizers import Tokenizer


def prepared_streams(
    config: DataConfig, tokenizer: Tokenizer
) -> tuple[TokenStreams, tuple[str, ...]] | None:
    """Map `data.source` if it is tokens; return the streams and the domains, None for text.

    Raises ConfigError on data.source or data.tokenizer: damaged, unfinished, or of another
    tokenizer.
    """
    refuse_unfinished(config.source)
    if is_shard_directory(config.source):
        return _open_shards(config, tokenizer)
    if is_token_file(config.source):
        return _open_token_file(config, tokenizer)
    return None


def masks_by_default(source: str) -> bool:
    """Return whether documents of a source do not see each other unless data.document_mask=false.

    Shards of an older version, which hold no boundaries, count too: nothing is opened.
    """
    if is_token_file(source):
        return Path(source).expanduser().with_suffix(".idx").is_file()
    return is_shard_directory(source)


def _open_shards(config: DataConfig, tokenizer: Tokenizer) -> tuple[TokenStreams, tuple[str, ...]]:
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
    streams = TokenStreams(
        arrays,
        (train.runs, held_out.runs),
        (train.sha256, held_out.sha256),
        # The split was made when the shards were written, so data.holdout is not used.
        index.holdout,
        "; ".join((summary, *index.notes)),
        (
            map_documents(directory, index, "train"),
            map_documents(directory, index, "held_out"),
        ),
        masked_by_default=True,
    )
    return streams, index.domains


def _open_token_file(
    config: DataConfig, tokenizer: Tokenizer
) -> tuple[TokenStreams, tuple[str, ...]]:
    """Map a file of tokens; its end, or data.validation_source, is held out."""
    refuse_fields(config, FIELDS[:2], f"the file of tokens {config.source}")
    file = open_token_file(Path(config.source))
    whole = len(file.token_N)
    if config.validation_source is not None:
        if not is_token_file(config.validation_source):
            raise ConfigError(
                "data.validation_source",
                config.validation_source,
                f"must be a file of tokens, as data.source={config.source} is",
                "name a .bin file, e.g. val.bin",
            )
        other = open_token_file(Path(config.validation_source), "data.validation_source")
        parts = ((file, 0, whole), (other, 0, len(other.token_N)))
        note = f"held out: {other.path}"
    else:
        check_holdout(config.holdout)
        cut = _cut(file, config.holdout)
        parts = ((file, 0, cut), (file, cut, whole))
        note = f"the last {1 - cut / whole:.2%} held out"
    starts = tuple(_starts(*part, tokenizer.separator) for part in parts)
    summary = (
        f"{file.path}: {file.kind} tokens ({file.token_N.dtype.name}); {note}; "
        "which tokenizer made them cannot be checked"
    )
    streams = TokenStreams(
        ([parts[0][0].token_N[: parts[0][2]]], [parts[1][0].token_N[parts[1][1] :]]),
        (ONE_DOMAIN, ONE_DOMAIN),
        (parts[0][0].fingerprint(), parts[1][0].fingerprint()),
        config.holdout,
        summary,
        (starts[0], starts[1]),
        masked_by_default=True,
    )
    return streams, (file.path.stem,)


def _cut(file: TokenFile, holdout: float) -> int:
    """Return the first held-out token: of a document, if an index tells where they begin."""
    cut = round(len(file.token_N) * (1 - holdout))
    if file.start_N is not None and len(file.start_N) > 1:
        # The first document that begins there or later; the last one if none does.
        place = int(np.searchsorted(file.start_N, cut))
        cut = int(file.start_N[min(max(place, 1), len(file.start_N) - 1)])
    return cut


def _starts(file: TokenFile, first: int, end: int, separator: int) -> np.ndarray | None:
    """Return `PackedDataset.document_start_N` of a part of a file; None if nothing tells."""
    if file.start_N is None:
        return None
    start_N = file.start_N[(file.start_N >= first) & (file.start_N < end)] - first
    if len(start_N) > 1 and file.token_N[first + start_N[1] - 1] == separator:
        # The file ends a document with the separator; in a stream, one opens a document.
        start_N = np.append(start_N[:1], start_N[1:] - 1)
    return start_N
