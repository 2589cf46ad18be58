"""Read text and rows from files of any format, as a stream: nothing is held but one batch.

    for record in read_records(Path("docs.jsonl.gz"), RecordFields()):
        record.content, record.place, record.label      # b"...", "docs.jsonl.gz line 1", None

detect.py       the format of a file, by its first bytes and its suffix
compression.py  gzip, bzip2, xz and zstandard, as a stream; a truncated file is an error
records.py      one document per record: which field is the text, which the label
rows.py         the rows of a file of records, with every field
json_rows.py    JSON Lines, arrays of objects         csv_rows.py    CSV and TSV
arrow_rows.py   Parquet, Arrow, saved datasets        hub.py         names of Hugging Face datasets

Files of tokens (nanoGPT, Megatron) are named by `format_of`; they hold no text and are not read
here. pyarrow, zstandard and datasets are imported by what needs them (extra `data`).
"""

from __future__ import annotations

from dmoe.data.formats.detect import Format, format_of
from dmoe.data.formats.records import Record, RecordFields, read_records
from dmoe.data.formats.rows import Row, Rows, open_rows

__all__ = [
    "Format",
    "Record",
    "RecordFields",
    "Row",
    "Rows",
    "format_of",
    "open_rows",
    "read_records",
]
