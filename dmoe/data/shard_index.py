"""index.json of a shard directory, validated field by field before any shard is opened.

    {"format": "dmoe-shards", "version": 1, "dtype": "uint16",
     "tokenizer": {"name": "bytes", "fingerprint": "...", "vocab_size": 256, "separator": 0},
     "holdout": 0.05,
     "domains": ["de", "python"], "notes": ["duplicate or empty files left out (2)"],
     "splits": {"train": {"documents": 700, "text_bytes": 11500000,
                          "sha256": "<of the whole token stream>",
                          "runs": [[0, 1], [7000, 0]],
                          "shards": [{"file": "train-00000.bin", "tokens": 8000, "bytes": 16000,
                                      "sha256": "..."}]},
                "held_out": {...}}}

"runs" says where the domain changes (`packing.DomainRuns`). Without "runs" and "domains" (shards of
an older version) there is one domain. "documents" of both splits add up to the documents that were
read: where the end of each is held out, "held_out" has 0. "boundaries" (absent in shards of an
older version) is a file of little-endian int64: the position of the separator before each document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.data.files import FORMAT, INDEX, is_unfinished
from dmoe.data.packing import ONE_DOMAIN, DomainRuns

SPLITS = ("train", "held_out")
_VERSION = 1
_DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.bin")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """One file of raw little-endian tokens."""

    file: str
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class DocumentsFile:
    """Where documents begin in a split: `<i8` positions of the separators before them."""

    file: str
    documents: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """One split of the corpus; its shards, in order, are one token stream."""

    documents: int
    text_bytes: int
    sha256: str
    shards: tuple[Shard, ...]
    runs: DomainRuns = ONE_DOMAIN
    boundaries: DocumentsFile | None = None
    """None in shards of an older version."""


@dataclass(frozen=True)
class ShardIndex:
    """Content of index.json."""

    dtype: np.dtype
    tokenizer: Mapping[str, Any]
    holdout: float
    splits: Mapping[str, Split]
    domains: tuple[str, ...] = ("text",)
    notes: tuple[str, ...] = ()
    """What was left out or changed when the text was read."""

    def to_json(self) -> str:
        """Return the text of index.json."""
        body = {
            "format": FORMAT,
            "version": _VERSION,
            "dtype": self.dtype.name,
            "tokenizer": dict(self.tokenizer),
            "holdout": self.holdout,
            "domains": list(self.domains),
            "notes": list(self.notes),
            "splits": {name: asdict(split) for name, split in self.splits.items()},
        }
        return json.dumps(body, indent=1) + "\n"


def is_shard_directory(source: str) -> bool:
    """Return whether `data.source` names a directory that holds an index.json."""
    return Path(source).expanduser().joinpath(INDEX).is_file()


def refuse_unfinished(source: str) -> None:
    """Refuse a directory whose preparation was interrupted. Raises ConfigError on data.source."""
    directory = Path(source).expanduser()
    if is_unfinished(directory) and not is_shard_directory(source):
        raise ConfigError(
            "data.source",
            directory,
            "is unfinished: dmoe data prepare was interrupted",
            "run the same dmoe data prepare again, which goes on",
        )


def read_index(directory: Path) -> ShardIndex:
    """Read and validate index.json; ConfigError on data.source if it cannot be used."""
    try:
        body = json.loads((directory / INDEX).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise damaged_error(directory, f"{INDEX} cannot be read ({error})") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ConfigError(
            "data.source",
            directory,
            f"has an {INDEX} that is not of format {FORMAT}",
            "name a directory written by dmoe data prepare, "
            f"or for text use the glob {directory}/**",
        )
    if body.get("version") != _VERSION:
        raise ConfigError(
            "data.source",
            directory,
            f"must be shards of version {_VERSION}, but is {body.get('version')}",
            "prepare it again",
        )
    try:
        return _parse(body)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged_error(directory, f"{INDEX} is wrong at {error}") from error


def damaged_error(directory: Path, reason: str) -> ConfigError:
    """Return the error for a shard directory that cannot be used."""
    return ConfigError(
        "data.source",
        directory,
        f"must be a whole directory of shards, but {reason}",
        "prepare it again",
    )


def _parse(body: dict[str, Any]) -> ShardIndex:
    dtype = _DTYPES[body["dtype"]]
    tokenizer = body["tokenizer"]
    if not isinstance(tokenizer, dict):
        raise ValueError("tokenizer")
    holdout = body["holdout"]
    if not isinstance(holdout, float) or not 0 < holdout < 1:
        raise ValueError("holdout")
    header = {
        "name": str(tokenizer["name"]),
        "fingerprint": _hash(tokenizer, "fingerprint"),
        "vocab_size": _count(tokenizer, "vocab_size", 1),
        "separator": _count(tokenizer, "separator", 0),
    }
    domains = _domains(body.get("domains", ["text"]))
    splits = {name: _split(body["splits"][name], dtype, len(domains)) for name in SPLITS}
    notes = body.get("notes", [])
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise ValueError(f"notes {notes!r}")
    return ShardIndex(dtype, header, holdout, splits, domains, tuple(notes))


def _split(body: dict[str, Any], dtype: np.dtype, num_domains: int) -> Split:
    shards = tuple(_shard(entry, dtype) for entry in body["shards"])
    runs = _runs(body.get("runs", ONE_DOMAIN), num_domains)
    return Split(
        _count(body, "documents", 0),
        _count(body, "text_bytes", 1),
        _hash(body, "sha256"),
        shards,
        runs,
        _boundaries(body.get("boundaries")),
    )


def _boundaries(body: dict[str, Any] | None) -> DocumentsFile | None:
    if body is None:
        return None
    return DocumentsFile(
        _file_name(body["file"]), _count(body, "documents", 0), _hash(body, "sha256")
    )


def _domains(names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"domains {names!r}")
    if names != sorted(set(names)):
        raise ValueError(f"domains {names!r}, which must be sorted and distinct")
    return tuple(names)


def _runs(body: Any, num_domains: int) -> DomainRuns:
    runs = tuple((start, label) for start, label in body)
    # `type` and not isinstance: True is an int.
    all_integers = all(type(number) is int for run in runs for number in run)
    if not all_integers or not runs or runs[0][0] != 0:
        raise ValueError(f"runs {body!r}")
    if any(not 0 <= label < num_domains for _, label in runs):
        raise ValueError(f"runs {body!r}")
    if any(before[0] >= after[0] for before, after in pairwise(runs)):
        raise ValueError("runs, whose positions must ascend")
    return runs


def _shard(entry: dict[str, Any], dtype: np.dtype) -> Shard:
    file = _file_name(entry["file"])
    shard = Shard(
        file, _count(entry, "tokens", 1), _count(entry, "bytes", 1), _hash(entry, "sha256")
    )
    if shard.bytes != shard.tokens * dtype.itemsize:
        raise ValueError(f"{shard.file}: {shard.tokens} tokens are not {shard.bytes} bytes")
    return shard


def _file_name(name: Any) -> str:
    # Untrusted input: only a plain file name, so that an index cannot point outside its directory.
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise ValueError(f"file name {name!r}, which must be a plain name ending in .bin")
    return name


def _count(body: dict[str, Any], key: str, minimum: int) -> int:
    value = body[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{key} {value!r}")
    return value


def _hash(body: dict[str, Any], key: str) -> str:
    value = body[key]
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"{key} {value!r}")
    return value
