"""Writers of every format, for tests: the same texts in other files."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

BOM = b"\xef\xbb\xbf"
Writer = Callable[[Path, Sequence[str]], Path]


def plain(folder: Path, texts: Sequence[str]) -> Path:
    """One file per text, in this order."""
    root = folder / "plain"
    root.mkdir()
    for number, text in enumerate(texts):
        (root / f"{number:04d}.txt").write_bytes(text.encode())
    return root


def compressed_plain(folder: Path, texts: Sequence[str]) -> Path:
    root = folder / "compressed"
    root.mkdir()
    for number, text in enumerate(texts):
        (root / f"{number:04d}.txt.gz").write_bytes(gzip.compress(text.encode()))
    return root


def _put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def json_lines(texts: Sequence[str], ascii: bool = True, end: str = "\n") -> bytes:
    return "".join(
        json.dumps({"id": n, "text": text}, ensure_ascii=ascii) + end
        for n, text in enumerate(texts)
    ).encode()


def separated(texts: Sequence[str], separator: str, quoting: int = csv.QUOTE_MINIMAL) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=separator, quoting=quoting)  # type: ignore[arg-type]
    writer.writerow(["id", "text"])
    writer.writerows(enumerate(texts))
    return file.getvalue().encode()


def table(texts: Sequence[str], kind: pa.DataType) -> pa.Table:
    columns = {"id": pa.array(range(len(texts))), "body": pa.array(texts, pa.string()).cast(kind)}
    return pa.table(columns)


def parquet(path: Path, texts: Sequence[str], kind: pa.DataType, **options: object) -> Path:
    pq.write_table(table(texts, kind), path, **options)
    return path


def arrow(path: Path, texts: Sequence[str], stream: bool) -> Path:
    whole = table(texts, pa.large_string())
    opened = pa.ipc.new_stream if stream else pa.ipc.new_file
    with opened(path, whole.schema) as file:
        file.write_table(whole, max_chunksize=None if stream else 3)
    return path


def split_jsonl(folder: Path, texts: Sequence[str]) -> Path:
    """Two files, compressed in two ways, in one directory."""
    root = folder / "two"
    root.mkdir()
    half = len(texts) // 2
    _put(root / "a.jsonl.bz2", bz2.compress(json_lines(texts[:half])))
    _put(root / "b.ndjson.xz", lzma.compress(json_lines(texts[half:])))
    return root


def members(compress: Callable[[bytes], bytes], content: bytes) -> bytes:
    """Compress the halves of a file apart, as `cat a.gz b.gz` gives."""
    half = len(content) // 2
    return compress(content[:half]) + compress(content[half:])


WRITERS: dict[str, Writer] = {
    "text.gz": compressed_plain,
    "jsonl": lambda d, t: _put(d / "a.jsonl", json_lines(t)),
    "jsonl, unicode, CRLF, BOM": lambda d, t: _put(
        d / "a.jsonl", BOM + json_lines(t, ascii=False, end="\r\n\r\n")
    ),
    "jsonl.gz": lambda d, t: _put(d / "a.jsonl.gz", members(gzip.compress, json_lines(t))),
    "jsonl.zst": lambda d, t: _put(d / "a.jsonl.zst", members(zstandard.compress, json_lines(t))),
    "jsonl by content": lambda d, t: _put(d / "a.json", json_lines(t)),
    "two compressed jsonl": split_jsonl,
    "json array": lambda d, t: _put(
        d / "a.json", json.dumps([{"text": text} for text in t], indent=1).encode()
    ),
    "csv": lambda d, t: _put(d / "a.csv", separated(t, ",")),
    "csv, semicolons, BOM": lambda d, t: _put(d / "a.csv", BOM + separated(t, ";")),
    "csv.gz, all quoted": lambda d, t: _put(
        d / "a.csv.gz", gzip.compress(separated(t, ",", csv.QUOTE_ALL))
    ),
    "tsv": lambda d, t: _put(d / "a.tsv", separated(t, "\t")),
    "parquet": lambda d, t: parquet(d / "a.parquet", t, pa.string(), row_group_size=2),
    "parquet, dictionary, zstd": lambda d, t: parquet(
        d / "a.parquet", t, pa.dictionary(pa.int32(), pa.string()), compression="zstd"
    ),
    "arrow file": lambda d, t: arrow(d / "a.arrow", t, stream=False),
    "arrow stream": lambda d, t: arrow(d / "a.arrow", t, stream=True),
}
"""Each writes texts into a folder and returns the `data.source`; `plain` is the reference."""
