"""Fault 20: 3,000 malformed safetensors headers, under hashes that agree with them: what the parsers make of them is a CheckpointError.

A run of the same bytes with a good header is loaded, so the manifest does not refuse for another reason.
"""

from __future__ import annotations

import json
import random
import struct
from collections import Counter
from pathlib import Path

import pytest

from dmoe.checkpoint import load, read_manifest, save
from dmoe.checkpoint.manifest import MANIFEST, Manifest, hash_file, write
from dmoe.config.errors import CheckpointError
from tests.checkpoint.experts import blank, same, whole

pytestmark = pytest.mark.drills

HEADERS = 3000
SHARD = "shard-00001-model-00001-of-00001.safetensors"
ODD = [
    "[]",
    "null",
    "1e999",
    '"x"',
    "{",
    "",
    "[" * 5000,
    '{"a":' * 2000,
    "\0",
    "\ud800",
    "-1",
    '{"__metadata__":{"a":1}}',
]
LENGTHS = [0, 1, 7, 2**31, 2**32 + 5, 2**63, 2**64 - 1]


def framed(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def bytes_replaced(dice: random.Random, header: bytes, data: bytes) -> bytes:
    bad = bytearray(header)
    for _ in range(dice.randrange(1, 6)):
        bad[dice.randrange(len(bad))] = dice.choice(b'\0\xff0123456789{}[],:"- aFIB')
    return framed(bytes(bad), data)


def length_lies(dice: random.Random, header: bytes, data: bytes) -> bytes:
    return framed(header, data, dice.choice([*LENGTHS, dice.randrange(2 * len(header))]))


def cut_short(dice: random.Random, header: bytes, data: bytes) -> bytes:
    return framed(header, data)[: dice.randrange(len(header) + 8)]


def other_json(dice: random.Random, header: bytes, data: bytes) -> bytes:
    return framed(dice.choice(ODD).encode(errors="surrogatepass"), data)


def field_changed(dice: random.Random, header: bytes, data: bytes) -> bytes:
    """Well-formed, and wrong: one tensor's dtype, shape or place in the file, its name, or where it belongs in the whole tensor."""
    tensors = json.loads(header)
    name = dice.choice([name for name in tensors if name != "__metadata__"])
    kind = dice.choice(
        ["dtype", "shape", "data_offsets", "name", "gone", "saved_offsets", "no metadata"]
    )
    if kind == "name":
        tensors[f"{name}x"] = tensors.pop(name)
    elif kind == "gone":
        del tensors[name]
    elif kind == "no metadata":
        del tensors["__metadata__"]
    elif kind == "saved_offsets":
        info = json.loads(tensors["__metadata__"]["DCP_SHARDING_INFO"])
        info[name] = dice.choice(
            [None, [], {"saved_offsets": [-1]}, {"saved_offsets": "0"}, {"saved_offsets": [9] * 9}]
        )
        tensors["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(info)
    else:
        odd = [
            None,
            -1,
            [],
            [-1],
            [2**63, 2**63],
            [0, 2**64],
            ["a"],
            {},
            "F32",
            [dice.randrange(99), dice.randrange(99)],
            "U128",
        ]
        tensors[name][kind] = dice.choice(odd)
    return framed(json.dumps(tensors).encode(), data)


def test_3000_malformed_headers_are_checkpoint_errors_and_nothing_else(tmp_path: Path) -> None:
    good = (save(tmp_path / "good", 1, whole(), {}) / SHARD).read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    header, data = good[8 : 8 + length], good[8 + length :]
    dice, path, refusals = random.Random(20), tmp_path / "step-00000001", Counter[str]()
    contents = read_manifest(tmp_path / "good" / "step-00000001").tensors
    path.mkdir()
    state = {name: blank(tensor) for name, tensor in whole().items()}
    untouched = {name: blank(tensor) for name, tensor in whole().items()}
    kinds = [bytes_replaced, length_lies, cut_short, other_json, field_changed]

    def accepts(content: bytes) -> bool:
        (path / SHARD).write_bytes(content)
        (path / MANIFEST).unlink(missing_ok=True)
        write(path, Manifest(1, {SHARD: hash_file(path / SHARD)}, contents, {}))
        try:
            load(path, state)
        except CheckpointError:
            return False
        return True

    for number in range(HEADERS):
        kind = kinds[number % len(kinds)]
        if not accepts(kind(dice, header, data)):
            refusals[kind.__name__] += 1
            assert same(state, untouched)
        for tensor, fresh in zip(state.values(), untouched.values(), strict=True):
            tensor.copy_(fresh)
    each = HEADERS // len(kinds)
    assert refusals["cut_short"] == refusals["other_json"] == each
    assert refusals["field_changed"] > 0.9 * each, (
        "some changes are none: a tensor without elements, a scalar's empty shape"
    )
    assert refusals["length_lies"] > 0.9 * each, "now and then the length is the true one"
    assert refusals["bytes_replaced"] > 0.6 * each, (
        "white space, or a digit of the metadata that nobody reads"
    )
    assert accepts(good)
    assert same(state, whole())
