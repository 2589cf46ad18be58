"""Compare an exported or trained directory with the one it was made from, tensor by tensor.

Shares no code with the conversions that wrote it: it only reads files. Training moves a tensor a
little; a wrong conversion puts another one in its place. So a tensor that is unlike its own source
and equal to another of the same layer, transposed or interleaved or not, is in the wrong place.

Found: tensors that are missing, new, or of another shape or dtype; tensors at the wrong place; one
tensor at two places; values that are not finite; any other key of config.json; other bytes of the
tokenizer, the chat template or the generation config.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dmoe.hf.published import BLOCKS, SCALES, PublishedDirectory

FLOATS = ("F64", "F32", "F16", "BF16")
ALIKE, UNLIKE = 0.9, 0.5
"""Cosines above and below which two tensors are the same, or not the same, for certain."""
MIN_ELEMENTS = 64
"""Of a tensor whose place is judged by a cosine: short vectors can be alike by chance."""
LAYER = re.compile(r"(.*?\.\d+\.)")
"""Start of a name up to its layer's number."""
WRITTEN_BY = ("transformers_version", "_name_or_path")
"""Keys of config.json that say who wrote it, and nothing of the model."""
READ_WITH_WEIGHTS = re.compile(
    r"(generation_config|tokenizer|chat_template|special_tokens_map|added_tokens|vocab|merges"
    r"|processor_config|preprocessor_config).*|.*\.model"
)
"""Names of the files, besides config.json, that change what a loaded model computes."""


@dataclass
class Comparison:
    """Result of `compare_directories`."""

    problems: list[str] = field(default_factory=list)
    """What is wrong, one sentence each."""
    changed: int = 0
    """Number of tensors whose values differ from the source's."""
    tensors: int = 0
    largest_change: float = 0.0
    """Of all tensors: 1 - cosine with the source's."""


def compare_directories(found: PublishedDirectory, source: PublishedDirectory) -> Comparison:
    """Compare all tensors of `found` with those of `source` by name, and the files beside them.

    Cost: reads both once; a suspicious tensor is compared with those of its layer. Memory: a few
    tensors.
    """
    result = Comparison(tensors=len(found.tensors))
    _compare_config(found, source, result)
    _compare_files(found, source, result)
    _compare_names(found, source, result)
    first_with: dict[tuple[str, str], str] = {}
    for name, facts in sorted(found.tensors.items()):
        if facts.dtype not in FLOATS and name not in source.tensors:
            continue
        value = found.read(name)
        if facts.dtype in FLOATS:
            _check_values(name, value, source, first_with, result)
        if name in source.tensors:
            _compare_tensor(name, value, found, source, result)
    return result


def _compare_tensor(
    name: str,
    value: Tensor,
    found: PublishedDirectory,
    source: PublishedDirectory,
    result: Comparison,
) -> None:
    facts, original = found.tensors[name], source.tensors[name]
    if source.quantized and original.dtype not in FLOATS:
        return  # its bytes are those of a code, in another shape
    for what, ours, theirs in (
        ("shape", list(facts.shape), list(original.shape)),
        ("type", facts.dtype, original.dtype),
    ):
        if ours != theirs:
            result.problems.append(f"{name} has {what} {ours}, and {theirs} in the source")
            return
    before = source.read(name)
    if torch.equal(value, before):
        return
    result.changed += 1
    alike = cosine(value, before)
    result.largest_change = max(result.largest_change, 1 - alike)
    problem = _misplaced(name, value, alike, source) or _rounded(name, value, before)
    if problem is not None:
        result.problems.append(problem)


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of two tensors as vectors; 1 for two zeros."""
    x, y = a.flatten().double(), b.flatten().double()
    norms = float(x.norm() * y.norm())
    if norms == 0:
        return 1.0 if float(x.norm()) == float(y.norm()) else 0.0
    return float(x @ y) / norms


def _compare_config(
    found: PublishedDirectory, source: PublishedDirectory, result: Comparison
) -> None:
    """Compare every key of config.json, those of its parts by dotted names."""
    ours, theirs = (dict(_flat(directory.config)) for directory in (found, source))
    undone = source.quantized and not found.quantized
    for key in sorted(ours.keys() | theirs.keys()):
        if key in WRITTEN_BY or (undone and key.startswith("quantization_config")):
            continue
        if key not in ours:
            sentence = f"config.json has no {key}, which is {theirs[key]} in the source"
        elif key not in theirs:
            sentence = f"config.json has {key}={ours[key]}, and the source has none"
        elif ours[key] != theirs[key] or isinstance(ours[key], bool) != isinstance(
            theirs[key], bool
        ):
            sentence = f"config.json has {key}={ours[key]}, and {theirs[key]} in the source"
        else:
            continue
        result.problems.append(sentence)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _compare_files(
    found: PublishedDirectory, source: PublishedDirectory, result: Comparison
) -> None:
    """Compare the bytes of the other files that are read with the weights: the tokenizer, ..."""
    ours, theirs = (
        {
            str(path.relative_to(directory.folder)): hashlib.sha256(path.read_bytes()).digest()
            for path in directory.other_files()
            if READ_WITH_WEIGHTS.fullmatch(path.name)
        }
        for directory in (found, source)
    )
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours:
            result.problems.append(f"{name} is missing, and is in the source")
        elif name not in theirs:
            result.problems.append(f"{name} is new, and is not in the source")
        elif ours[name] != theirs[name]:
            result.problems.append(f"{name} has other bytes than the source's")


def _compare_names(
    found: PublishedDirectory, source: PublishedDirectory, result: Comparison
) -> None:
    expected = set(source.tensors)
    if source.quantized and not found.quantized:
        expected = {n.removesuffix(BLOCKS) for n in expected if not n.endswith(SCALES)}
    for where, names in (
        ("missing", expected - found.tensors.keys()),
        ("new", found.tensors.keys() - expected),
    ):
        if names:
            first = sorted(names)[0]
            result.problems.append(f"{first} is {where}; {len(names)} tensors are")


def _misplaced(name: str, value: Tensor, alike: float, source: PublishedDirectory) -> str | None:
    """Return a sentence if a tensor is unlike its own source and equal to something else there."""
    if alike > UNLIKE or value.numel() < MIN_ELEMENTS:
        return None
    for other, form, candidate in _candidates(name, source):
        if candidate.shape == value.shape and cosine(value, candidate) > ALIKE:
            place = f"{other} of the source{form}"
            return f"{name} is not what the source has there (cosine {alike:.2f}): it is {place}"
    return None


def _candidates(name: str, source: PublishedDirectory) -> Iterator[tuple[str, str, Tensor]]:
    """Yield the tensors of the same layer with a note of how they were turned."""
    layer = match[1] if (match := LAYER.match(name)) else ""
    facts = source.tensors[name]
    own = [name, *(n for n in source.tensors if n.startswith(layer) and n != name)]
    for other in own:
        shape = source.tensors[other].shape
        if sorted(shape) != sorted(facts.shape) or source.tensors[other].dtype not in FLOATS:
            continue
        value = source.read(other)
        for form, turned in _turned(value):
            if not (other == name and not form):
                yield other, form, turned


def _turned(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor as it is, transposed, and with halves swapped, interleaved, de-interleaved."""
    yield "", value
    if value.ndim >= 2:
        yield ", transposed", value.transpose(-1, -2)
    for dim in {value.ndim - 1, max(0, value.ndim - 2)}:
        if value.shape[dim] % 2:
            continue
        first, second = value.chunk(2, dim)
        yield ", its halves swapped", torch.cat([second, first], dim)
        yield ", interleaved", torch.stack([first, second], dim + 1).flatten(dim, dim + 1)
        pairs = value.movedim(dim, -1)
        even_odd = torch.cat([pairs[..., ::2], pairs[..., 1::2]], -1)
        yield ", de-interleaved", even_odd.movedim(-1, dim)


def _rounded(name: str, value: Tensor, before: Tensor) -> str | None:
    """Return a sentence if all values are bfloat16 numbers in a wider type, and were not before."""
    if value.dtype not in (torch.float32, torch.float64):
        return None

    def is_rounded(tensor: Tensor) -> bool:
        return torch.equal(tensor, tensor.to(torch.bfloat16).to(tensor.dtype))

    if is_rounded(value) and not is_rounded(before):
        return f"{name} is rounded to bfloat16, and is not in the source"
    return None


def _check_values(
    name: str,
    value: Tensor,
    source: PublishedDirectory,
    first_with: dict[tuple[str, str], str],
    result: Comparison,
) -> None:
    """Report values that are not finite, and a copy of another tensor or expert.

    Copies are none if the source has them too.
    """
    if not bool(value.isfinite().all()):
        result.problems.append(f"{name} has values that are not finite")
    for part, rows in _parts(name, value):
        if rows.numel() < 2 or not bool(rows.any()):
            continue
        data = rows.contiguous().view(torch.uint8).numpy().data
        key = (hashlib.sha256(data).hexdigest(), str(list(rows.shape)))
        twin = first_with.setdefault(key, part)
        if twin != part and not _equal_in_source(twin, part, source):
            result.problems.append(f"{part} is a copy of {twin}, and is not in the source")


def _parts(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor, or the experts of a stack."""
    if value.ndim < 3:
        yield name, value
        return
    for expert, rows in enumerate(value):
        yield f"{name}[{expert}]", rows


def _equal_in_source(one: str, other: str, source: PublishedDirectory) -> bool:
    values = []
    for part in (one, other):
        name, _, index = part.partition("[")
        if name not in source.tensors:
            return False
        value = source.read(name)
        values.append(value[int(index.rstrip("]"))] if index else value)
    return torch.equal(*values)
