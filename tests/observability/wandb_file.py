"""Reader of `.wandb` files with wandb's own record types.

wandb removed its Python reader (0.31 reads in wandb-core only). The framing is LevelDB's log format
after a header of 7 bytes: blocks of 32 KiB, each record with checksum (4), length (2), type (1).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7
FULL, LAST = 1, 4


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    data, position, parts = path.read_bytes(), HEADER, b""
    assert data[:4] == b":W&B"
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:  # rest of a block, too small
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
    """Read the records of one kind (history, alert, artifact) of all runs, as `wandb sync` does."""
    files = sorted(folder.glob("*run-*/run-*.wandb"))
    found = (record for file in files for record in records(file))
    return [getattr(record, kind) for record in found if record.WhichOneof("record_type") == kind]


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Read the history rows; a figure or table has the keys `NAME/path` and `NAME/_type`."""
    return [
        {
            (item.key or "/".join(item.nested_key)): json.loads(item.value_json)
            for item in history.item
        }
        for history in all_records(folder, "history")
    ]
