"""Codec of the `layers` of a metrics line: its structure once, its numbers as little-endian arrays.

A line has the same quantities for each MoE layer, so its numbers are columns: all numbers under one
path of keys (`load`, `aux/switch`), in the order of the layers. The structure of the layers (a
`Spec`, plain JSON) says where each number of a column belongs.

A column is exact (unsigned integers of 1, 2 or 4 bytes, float32 if that is exact, float64) unless
the line would be larger than its limit. Then, one column after the other, the largest first:

1. float64 is rounded to float32: relative error 6e-8.
2. A column is stored with one byte per number. Without negative values on a logarithmic scale:
   code 0 is 0, codes 1 to 255 are low x (high / low)^((code - 1) / 254), where low and high are
   the smallest and the largest number above 0. The relative error is at most
   (high / low)^(1 / 508) - 1: 0.5% if the largest is 10 times the smallest, 1.4% if it is 1,000
   times, 2.8% if 1,000,000 times. With negative values the scale is linear from low to high, and
   the error at most (high - low) / 510.

Zeros, the smallest and the largest number of a column stay exact, and whole numbers stay whole.
A missing number (null) is a NaN in float32 or float64; such a column is never stored in bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

Spec = Any
"""Structure of a value: 0 for a number, n for a list of n numbers, a list of structures for any
other list, {"keys": {key: structure}} for a dict, {"value": x} for text and booleans."""
Path = tuple[str, ...]
Array = NDArray[np.float64]

CONSTANT, U8, U16, U32, F32, F64, LOG_U8, LINEAR_U8 = range(8)
"""Encodings of a column: one float64 for all, exact, rounded, quantized."""
WHOLE = 0x80
"""Flag of an encoding: the numbers are whole, and were written without a decimal point."""
DTYPES = {U8: "<u1", U16: "<u2", U32: "<u4", F32: "<f4", F64: "<f8"}
BOUNDS = struct.Struct("<dd")
NUM_STEPS = 254
"""Steps of the logarithmic scale; the linear one has 255."""


def split(layers: list[Any]) -> tuple[str, dict[Path, list[float | None]]]:
    """Return the structure of `layers` as JSON, and its columns by path."""
    columns: dict[Path, list[float | None]] = {}
    spec = [_describe(layer, (), columns) for layer in layers]
    return json.dumps(spec, separators=(",", ":")), columns


def _describe(value: Any, path: Path, columns: dict[Path, list[float | None]]) -> Spec:
    """Return the structure of `value` and append its numbers to their column."""
    if _is_number(value):
        columns.setdefault(path, []).append(value)
        return 0
    if isinstance(value, list):
        if value and all(map(_is_number, value)):
            columns.setdefault(path, []).extend(value)
            return len(value)
        return [_describe(item, path, columns) for item in value]
    if isinstance(value, dict):
        keys = {key: _describe(item, (*path, key), columns) for key, item in value.items()}
        return {"keys": keys}
    return {"value": value}


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def column_lengths(spec: Spec) -> dict[Path, int]:
    """Return the length of each column, in the order in which `split` has found them."""
    lengths: dict[Path, int] = {}
    for layer in spec:
        _count(layer, (), lengths)
    return lengths


def _count(spec: Spec, path: Path, lengths: dict[Path, int]) -> None:
    if isinstance(spec, int):
        lengths[path] = lengths.get(path, 0) + (spec or 1)
    elif isinstance(spec, list):
        for item in spec:
            _count(item, path, lengths)
    else:
        for key, item in spec.get("keys", {}).items():
            _count(item, (*path, key), lengths)


def join(spec: Spec, columns: dict[Path, list[float | None]]) -> list[Any]:
    """Return the layers of this structure with the numbers of `columns`: the inverse of `split`."""
    numbers = {path: iter(values) for path, values in columns.items()}
    return [_build(layer, (), numbers) for layer in spec]


def _build(spec: Spec, path: Path, numbers: dict[Path, Iterator[float | None]]) -> Any:
    if isinstance(spec, int):
        return list(islice(numbers[path], spec)) if spec else next(numbers[path])
    if isinstance(spec, list):
        return [_build(item, path, numbers) for item in spec]
    if "keys" in spec:
        return {key: _build(item, (*path, key), numbers) for key, item in spec["keys"].items()}
    return spec["value"]


def encode(columns: dict[Path, list[float | None]], max_bytes: int) -> bytes:
    """Encode the columns one after the other: exactly, or as the docstring above if too large.

    Args:
        columns: by path.
        max_bytes: the limit. It is kept where one byte per number, and 17 per column, is enough.
    """
    arrays = {path: np.array(values, dtype=np.float64) for path, values in columns.items()}
    whole = {path: all(type(v) is int for v in values) for path, values in columns.items()}
    encoded = {path: _encode_exactly(array) for path, array in arrays.items()}
    for smaller in (_encode_float32, _encode_bytes):
        total = sum(map(len, encoded.values()))
        for path in sorted(encoded, key=lambda path: -len(encoded[path])):
            if total <= max_bytes:
                break
            found = smaller(arrays[path])
            if found is not None and len(found) < len(encoded[path]):
                total += len(found) - len(encoded[path])
                encoded[path] = found
    return b"".join(
        bytes([data[0] | (WHOLE if whole[path] else 0)]) + data[1:]
        for path, data in encoded.items()
    )


def _encode_exactly(array: Array) -> bytes:
    if array.size > 1 and (array == array[0]).all():
        return bytes([CONSTANT]) + struct.pack("<d", array[0])
    if np.isfinite(array).all() and (array == np.trunc(array)).all() and array.min() >= 0:
        for code in (U8, U16, U32):
            if array.max() <= np.iinfo(DTYPES[code]).max:
                return bytes([code]) + array.astype(DTYPES[code]).tobytes()
    single = _encode_float32(array)
    if single is not None and np.array_equal(decode_floats(single), array, equal_nan=True):
        return single
    return bytes([F64]) + array.astype(DTYPES[F64]).tobytes()


def decode_floats(data: bytes) -> Array:
    """Return the numbers of a column that is stored as float32."""
    return np.frombuffer(data, DTYPES[F32], offset=1).astype(np.float64)


def _encode_float32(array: Array) -> bytes | None:
    """Round to float32; None where a number is too large for it."""
    if (np.abs(array) > np.finfo(np.float32).max).any():
        return None
    return bytes([F32]) + array.astype(DTYPES[F32]).tobytes()


def _encode_bytes(array: Array) -> bytes | None:
    """Quantize to one byte per number; None where a number is missing."""
    if not np.isfinite(array).all():
        return None
    if array.min() < 0:
        low, high = float(array.min()), float(array.max())
        codes = np.rint((array - low) / ((high - low) or 1.0) * (NUM_STEPS + 1))
        return bytes([LINEAR_U8]) + BOUNDS.pack(low, high) + codes.astype("<u1").tobytes()
    low, high, quantized = quantize(array)
    return bytes([LOG_U8]) + BOUNDS.pack(low, high) + quantized


def quantize(numbers: Sequence[float] | Array) -> tuple[float, float, bytes]:
    """Quantize to one byte per number, on the logarithmic scale of the docstring above.

    Returns:
        The smallest and the largest number above 0 (1 and 1 if there is none), and the codes.
    """
    array = np.asarray(numbers, dtype=np.float64)
    positive = array[array > 0]
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (1.0, 1.0)
    span = np.log(high / low) or 1.0
    with np.errstate(divide="ignore"):
        codes = np.rint(np.log(array / low) / span * NUM_STEPS) + 1
    return low, high, np.where(array > 0, codes, 0.0).astype("<u1").tobytes()


def decode(data: bytes, lengths: dict[Path, int]) -> dict[Path, list[float | None]]:
    """Decode the columns of these lengths. Raises ValueError if `data` does not fit them."""
    columns: dict[Path, list[float | None]] = {}
    offset = 0
    for path, length in lengths.items():
        if offset >= len(data):
            raise ValueError("too short")
        code, is_whole = data[offset] & ~WHOLE, bool(data[offset] & WHOLE)
        array, offset = _decode_column(code, data, offset + 1, length)
        columns[path] = _to_list(array, is_whole)
    if offset != len(data):
        raise ValueError("too long")
    return columns


def _decode_column(code: int, data: bytes, offset: int, length: int) -> tuple[Array, int]:
    """Return the numbers of the column at `offset`, and the offset behind them."""
    if code == CONSTANT:
        (value,) = _unpack("<d", data, offset)
        return np.full(length, value), offset + 8
    if code in DTYPES:
        array = np.frombuffer(data, DTYPES[code], length, offset)
        return array.astype(np.float64), offset + array.nbytes
    if code not in (LOG_U8, LINEAR_U8):
        raise ValueError(f"unknown encoding {code}")
    low, high = _unpack(BOUNDS.format, data, offset)
    offset += BOUNDS.size
    codes = np.frombuffer(data, "<u1", length, offset)
    return _scale(code, low, high)[codes], offset + length


def _unpack(form: str, data: bytes, offset: int) -> tuple[float, ...]:
    try:
        return struct.unpack_from(form, data, offset)
    except struct.error as error:
        raise ValueError(str(error)) from None


def _scale(code: int, low: float, high: float) -> Array:
    """Return the number of each of the 256 codes."""
    if code == LINEAR_U8:
        linear = low + (high - low) * np.arange(NUM_STEPS + 2) / (NUM_STEPS + 1)
        linear[-1] = high
        return linear
    steps = low * (high / low) ** (np.arange(NUM_STEPS + 1) / NUM_STEPS)
    steps[[0, -1]] = low, high
    table = np.concatenate([[0.0], steps])
    # counts stay counts
    return np.rint(table) if low == int(low) and high == int(high) else table


def _to_list(array: Array, is_whole: bool) -> list[float | None]:
    if is_whole:
        return [int(value) for value in array.tolist()]
    values: list[float | None] = array.tolist()
    if not np.isnan(array).any():
        return values
    return [None if value != value else value for value in values]
