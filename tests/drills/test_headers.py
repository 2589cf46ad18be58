"""Fault 20: 3,000 malformed safetensors headers with matching hashes are CheckpointErrors.

The same bytes with a valid header are loaded, so the manifest does not refuse them.
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
from tests.checkpoint.states import full_state, ones_like, states_equal

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


def bytes_replaced(rng: random.Random, header: bytes, data: bytes) -> bytes:
    bad = bytearray(header)
    for _ in range(rng.randrange(1, 6)):
        bad[rng.randrange(len(bad))] = rng.choice(b'\0\xff0123456789{}[],:"- aFIB')
    return framed(bytes(bad), data)


def length_lies(rng: random.Random, header: bytes, data: bytes) -> bytes:
    return framed(header, data, rng.choice([*LENGTHS, rng.randrange(2 * len(header))]))


def cut_short(rng: random.Random, header: bytes, data: bytes) -> bytes:
    return framed(header, data)[: rng.randrange(len(header) + 8)]


def other_json(rng: random.Random, header: bytes, data: bytes) -> bytes:
    return framed(rng.choice(ODD).encode(errors="surrogatepass"), data)


def field_changed(rng: random.Random, header: bytes, data: bytes) -> bytes:
    """Change dtype, shape, offsets or name of one tensor in a well-formed header."""
    tensors = json.loads(header)
    name = rng.choice([name for name in tensors if name != "__metadata__"])
    kind = rng.choice(
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
        info[name] = rng.choice(
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
            [rng.randrange(99), rng.randrange(99)],
            "U128",
        ]
        tensors[name][kind] = rng.choice(odd)
    return framed(json.dumps(tensors).encode(), data)


def test_malformed_headers_are_checkpoint_errors(tmp_path: Path) -> None:
    good = (save(tmp_path / "good", 1, full_state(), {}) / SHARD).read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    header, data = good[8 : 8 + length], good[8 + length :]
    rng, path, refusals = random.Random(20), tmp_path / "step-00000001", Counter[str]()
    contents = read_manifest(tmp_path / "good" / "step-00000001").tensors
    path.mkdir()
    state = {name: ones_like(tensor) for name, tensor in full_state().items()}
    unchanged = {name: ones_like(tensor) for name, tensor in full_state().items()}
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
        if not accepts(kind(rng, header, data)):
            refusals[kind.__name__] += 1
            assert states_equal(state, unchanged)
        for tensor, fresh in zip(state.values(), unchanged.values(), strict=True):
            tensor.copy_(fresh)
    each = HEADERS // len(kinds)
    assert refusals["cut_short"] == refusals["other_json"] == each
    assert refusals["field_changed"] > 0.9 * each, (
        "some changes are none: a tensor without elements, a scalar's empty shape"
    )
    assert refusals["length_lies"] > 0.9 * each, "sometimes the length is the true one"
    assert refusals["bytes_replaced"] > 0.6 * each, (
        "white space, or an unused digit of the metadata"
    )
    assert accepts(good)
    assert states_equal(state, full_state())
