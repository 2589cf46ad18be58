"""The format of a file, by its first bytes and its suffix.

The first bytes decide where they can (Parquet, gzip, UTF-16, ...); text that is records by its
name only (CSV) is told by the suffix. A suffix `.txt` says that text is meant as it is: a model of
JSON Lines themselves is possible. What is neither text, nor records, nor tokens is of kind `other`
and comes with a reason and a fix.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from dmoe.data.formats.compression import SUFFIXES, compression_of, inner_name, open_stream

PROBE_BYTES = 8192
"""Bytes at the beginning of a file, decompressed, that decide what it is."""
LONGEST_LINE = 1 << 24
"""Bytes of a line that are read to see whether a file without a telling suffix is JSON Lines."""
CONVERT = "write its text to a .txt file"
UTF_16 = "convert it with iconv -f UTF-16 -t UTF-8"
OTHER: dict[bytes, tuple[str, str]] = {
    b"PK\x03\x04": ("zip", "unpack it first"),
    b"%PDF": ("PDF", CONVERT),
    b"{\\rtf": ("RTF", CONVERT),
    b"\xff\xfe": ("UTF-16", UTF_16),
    b"\xfe\xff": ("UTF-16", UTF_16),
}
"""First bytes of formats that hold text, but not as bytes that could be trained on."""
RECORDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".jl"), "JSON Lines"),
    **dict.fromkeys((".csv", ".tsv", ".tab"), "CSV"),
    **dict.fromkeys((".parquet", ".pq"), "Parquet"),
    **dict.fromkeys((".arrow", ".feather"), "Arrow"),
}
"""Suffixes of files of records."""
CONTROL = bytes(n for n in range(32) if chr(n) not in "\t\n\v\f\r\x1b")
"""Bytes that text hardly has."""
SAVED = ("dataset_info.json", "state.json")
"""Files that `Dataset.save_to_disk` writes beside its Arrow files."""
SAVED_SPLITS = "dataset_dict.json"
"""The file that `DatasetDict.save_to_disk` writes; each split is a directory below."""


@dataclass(frozen=True)
class Format:
    """What a file is.

    text: the whole file is one document. records: each record is one. tokens: numbers of a
    tokenizer, without text. other: nothing that can be trained on; `fix` says what to do.
    """

    name: str
    """`plain text`, `JSON Lines`, `JSON array`, `CSV`, `Parquet`, `Arrow`, `saved dataset`,
    `nanoGPT tokens`, `Megatron tokens`, or the name of another format."""
    kind: Literal["text", "records", "tokens", "other"]
    compression: str | None = None
    """gzip, bzip2, xz or zstandard."""
    fix: str = ""


def format_of(path: Path, origin: str = "data.source") -> Format:
    """Return the format of a plain file, or of a directory that holds a saved dataset.

    Args:
        path: an existing file, or a directory.
        origin: the config field that names it.

    Raises:
        ConfigError: it cannot be read, or its compression is damaged.

    Cost: one read of `PROBE_BYTES`.
    """
    if path.is_dir():
        if is_saved_dataset(path):
            return Format("saved dataset", "records")
        return Format("directory", "other", fix="name a file of it")
    with open_stream(path, None, origin) as file:
        head = _read_head(path, file)
    compression = compression_of(head)
    named = SUFFIXES.get(path.suffix.lower())
    if named is not None and named != compression:
        found = f"damaged {named}" if compression is None else compression
        fix = f"it is named {path.suffix} and does not begin like a {named} file: write it again"
        return Format(found, "other", fix=fix)
    if compression is None:
        return _format_of_content(path, head)
    inside = inner_name(path, compression)
    with open_stream(path, compression, origin) as file:
        head = _read_head(inside, file)
    inner = _format_of_content(inside, head)
    if inner.name in ("Parquet", "Arrow") or inner.kind == "tokens":
        fix = f"decompress it first: {inner.name} is read from any position"
        return Format(f"compressed {inner.name}", "other", fix=fix)
    if compression_of(head) is not None:
        return Format("twice compressed", "other", fix="decompress it first")
    return Format(inner.name, inner.kind, compression, inner.fix)


def is_saved_dataset(directory: Path) -> bool:
    """Return whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote a directory."""
    return all((directory / name).is_file() for name in SAVED) or (
        (directory / SAVED_SPLITS).is_file()
    )


def _read_head(path: Path, file: BinaryIO) -> bytes:
    """Read `PROBE_BYTES`; of what may be JSON Lines by its content, two whole lines."""
    head = file.read(PROBE_BYTES)
    if path.suffix.lower() in ("", ".json") and head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{":
        for _ in range(2):
            head += file.readline(LONGEST_LINE)
    return head


def _format_of_content(path: Path, head: bytes) -> Format:
    suffix = path.suffix.lower()
    for magic, (name, fix) in OTHER.items():
        if head.startswith(magic):
            return Format(name, "other", fix=fix)
    if head.startswith(b"PAR1"):
        return Format("Parquet", "records")
    if head.startswith(b"ARROW1"):
        return Format("Arrow", "records")
    if head.startswith(b"MMIDIDX") or (suffix == ".bin" and path.with_suffix(".idx").is_file()):
        return Format("Megatron tokens", "tokens")
    if suffix == ".bin":
        return Format("nanoGPT tokens", "tokens")
    if RECORDS.get(suffix) in ("Parquet", "Arrow"):
        return Format(RECORDS[suffix], "records")
    if head[257:262] == b"ustar":
        return Format("tar", "other", fix="unpack it first")
    controls = sum(map(head.count, CONTROL))
    if controls > 1 and controls > len(head) / 50:
        return Format("binary", "other", fix="name text files")
    if suffix == ".ipynb":
        fix = "write the text of its cells to .txt files, e.g. with jupyter nbconvert"
        return Format("Jupyter", "other", fix=fix)
    if suffix in RECORDS:
        return Format(RECORDS[suffix], "records")
    if suffix in ("", ".json") and (found := _json_records(head)):
        return Format(found, "records")
    return Format("plain text", "text")


def _json_records(head: bytes) -> str | None:
    """Return which kind of records a text is in JSON: an object per line, an array of objects."""
    head = head.removeprefix(b"\xef\xbb\xbf")
    if re.match(rb"\s*\[\s*\{", head):
        return "JSON array"
    lines = [line for line in head.splitlines()[:3] if line.strip()]
    if len(lines) < 2 or not all(line.lstrip().startswith(b"{") for line in lines[:2]):
        return None
    try:
        return "JSON Lines" if isinstance(json.loads(lines[0]), dict) else None
    except ValueError:
        return None
