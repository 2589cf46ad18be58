"""What a `.wandb` file holds, with wandb's own record types. The Python reader was removed from wandb (0.31 reads in wandb-core only).

The framing is LevelDB's log format after a header of 7 bytes: blocks of 32 KiB, each record with checksum (4), length (2), type (1).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

__all__ = ["all_records", "read_rows", "records"]

BLOCK, HEADER = 32768, 7
FULL, LAST = 1, 4


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    data, position, parts = path.read_bytes(), HEADER, b""
    assert data[:4] == b":W&B"
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:  # what is left of a block and too small for a record
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def all_records(folder: Path, kind: str) -> list[Any]:
    """The records of one kind (history, alert, artifact) of all runs in a wandb directory, in the order `wandb sync` takes them."""
    files = sorted(folder.glob("*run-*/run-*.wandb"))
    found = (record for file in files for record in records(file))
    return [getattr(record, kind) for record in found if record.WhichOneof("record_type") == kind]


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The history rows; the parts of a picture or a table are `NAME/path`, `NAME/_type`."""
    return [
        {
            (item.key or "/".join(item.nested_key)): json.loads(item.value_json)
            for item in history.item
        }
        for history in all_records(folder, "history")
    ]
