"""Compare two captures: the differing quantities, by how much, and where.

Letters: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from dmoe.verify.cases import NUM_STEPS
from dmoe.verify.decisions import Capture
from dmoe.verify.differences import (
    BACKWARD,
    EXACT,
    FORWARD,
    TOLERANCE,
    Array,
    Difference,
    choices_difference,
    difference_of,
    exact_difference,
    multiple_of,
)

SAMPLE_PARTS = ("input", "target", "label", "position", "valid")


def compare(
    actual: Capture, expected: Capture, rank: int, world: int, layers: Sequence[str]
) -> list[Difference]:
    """Return the largest difference of every quantity, step and layer, zero included.

    Args:
        actual: capture of one rank.
        expected: capture of the reference.
        rank: the rank that made `actual`.
        world: number of ranks.
        layers: names of the MoE layers in the model.
    """
    largest: dict[tuple[str, int, float], Difference] = {}
    for difference in _all_differences(actual, expected, rank, world, layers):
        key = (difference.quantity, difference.step, difference.layer)
        if key not in largest or difference.size > largest[key].size:
            largest[key] = difference
    return list(largest.values())


def _all_differences(
    actual: Capture, expected: Capture, rank: int, world: int, layers: Sequence[str]
) -> Iterator[Difference]:
    for name, a, b in _pairs("initial/", actual, expected):
        yield difference_of("initial weights", name, a, b)
    yield equal_draws(actual)
    for step in range(NUM_STEPS):
        for part in SAMPLE_PARTS:
            for micro_step, a, b in _pairs(f"{part}/{step}/", actual, expected):
                place = f"{part} of step {step}, accumulation step {micro_step}"
                found = exact_difference("samples", place, a, _rows_of_rank(b, rank, world))
                yield replace(found, step=step)
        yield from _records(actual, expected, rank, world, step)
        yield from _sums(actual, expected, step)
        yield from _gradients(actual, expected, layers, step)
        yield from _updates(actual, expected, step)
    for name, a, b in _pairs("final/", actual, expected):
        if not name.startswith(("model.", "buffer.", "step.")):
            yield replace(difference_of("moments", name, a, b), step=NUM_STEPS - 1)
    for name, a, b in _pairs("evaluation/", actual, expected):
        yield replace(difference_of("evaluation", name, a, b), step=NUM_STEPS - 1)


def _records(
    actual: Capture, expected: Capture, rank: int, world: int, step: int
) -> Iterator[Difference]:
    """Compare what the MoE layers computed for this rank's tokens."""
    for quantity, record in {**FORWARD, **BACKWARD}.items():
        for key, a, b in _pairs(f"{record}/{step}/", actual, expected):
            micro_step, number = key.split("/")
            earlier, _, module = number.partition(".")
            layer = int(earlier) - 0.5 if module else int(earlier)
            name = f"adapter layer {module}" if module else f"MoE layer {number}"
            place = f"step {step}, accumulation step {micro_step}, {name}"
            if record == "slots":
                found = exact_difference(quantity, place, a * world if a.shape == () else a, b)
            elif quantity in EXACT:
                found = choices_difference(quantity, place, a, _rows_of_rank(b, rank, world), rank)
            else:
                found = difference_of(quantity, place, a, _rows_of_rank(b, rank, world))
            yield replace(found, step=step, layer=layer)


def _rows_of_rank(expected: Array, rank: int, world: int) -> Array:
    rows = len(expected) // world if expected.ndim else 0
    return expected[rank * rows : (rank + 1) * rows]


def _sums(actual: Capture, expected: Capture, step: int) -> Iterator[Difference]:
    """Compare the sums over the global batch."""
    for n, a, b in _pairs(f"counts/{step}/", actual, expected):
        found = exact_difference("counts", f"step {step}, {_layer_name(n)}, (kind, expert)", a, b)
        yield replace(found, step=step, layer=int(n) if n.isdigit() else -1)
    for quantity, name in (
        ("loss", "loss"),
        ("global norm", "norm"),
        ("clip coefficient", "clip"),
        ("learning rate", "learning_rate"),
    ):
        for place, a, b in _pairs(f"{name}/{step}", actual, expected):
            yield replace(difference_of(quantity, f"step {step}{place}", a, b), step=step)
    for name, a, b in _pairs(f"aux/{step}/", actual, expected):
        layer, _, loss = name.rpartition("/")
        found = difference_of(
            "auxiliary losses", f"step {step}, {_layer_name(layer)}, {loss}", a, b
        )
        yield replace(found, step=step, layer=int(layer) if layer.isdigit() else -1)


def _layer_name(n: str) -> str:
    return f"MoE layer {n}" if n.isdigit() else f"adapter layer {n.removeprefix('modules/')}"


def _gradients(
    actual: Capture, expected: Capture, layers: Sequence[str], step: int
) -> Iterator[Difference]:
    for name, a, b in _pairs(f"gradient/{step}/", actual, expected):
        layer = next((n for n, path in enumerate(layers) if name.startswith(f"{path}.")), -1)
        if ".experts." in name:
            pairs, quantity = _by_expert(name, a, b), "expert gradients"
        else:
            pairs = [(name, a, b)]
            quantity = "router gradient" if ".router." in name else "dense gradients"
        for where, x, y in pairs:
            found = difference_of(quantity, f"step {step}, {where}", x, y)
            part = expected.get(f"auxiliary_part/{step}/{name}")
            if part is not None and found.size > TOLERANCE["float32"] and not found.finding:
                found = replace(found, finding=_auxiliary_share(x, y, part))
            yield replace(found, step=step, layer=layer)


def _auxiliary_share(actual: Array, expected: Array, part: Array) -> str:
    """Describe the difference as a multiple of the auxiliary losses' part, if it is one."""
    share = multiple_of(actual, expected, part)
    if share is None:
        return ""
    return f"auxiliary losses enter {1 + share:.4g} times"


def _updates(actual: Capture, expected: Capture, step: int) -> Iterator[Difference]:
    """Compare biases and parameters after a step."""
    for name, a, b in _pairs(f"bias/{step}/", actual, expected):
        yield replace(exact_difference("bias", f"step {step}, {name}", a, b), step=step)
    before = "initial/" if step == 0 else f"weights/{step - 1}/"
    for name, a, b in _pairs(f"weights/{step}/", actual, expected):
        found = difference_of("parameters after two steps", f"{name}, after step {step}", a, b)
        start = expected.get(before + name)
        if found.size > TOLERANCE["float32"] and start is not None and not found.finding:
            if multiple_of(a, b, start) is not None:
                found = replace(found, finding="a multiple of the weights")
            elif (share := multiple_of(a, b, np.subtract(b, start))) is not None:
                found = replace(found, finding=f"the update is {1 + share:.4g} times")
        yield replace(found, step=step)


def _pairs(prefix: str, actual: Capture, expected: Capture) -> list[tuple[str, Array, Array]]:
    names = sorted(name for name in actual.keys() | expected.keys() if name.startswith(prefix))
    empty = np.zeros(0)
    return [
        (name.removeprefix(prefix), actual.get(name, empty), expected.get(name, empty))
        for name in names
    ]


def _by_expert(name: str, actual: Array, expected: Array) -> list[tuple[str, Array, Array]]:
    # with fewer than 3 dimensions, the tensor belongs to one expert
    if actual.shape != expected.shape or expected.ndim < 3:
        return [(name, actual, expected)]
    return [(f"{name} of expert {e}", actual[e], expected[e]) for e in range(len(expected))]


DRAWN_PREFIX = 16
"""Numbers compared of two draws: torch fills blocks of 16 alike, whatever the tensor's shape."""


def equal_draws(actual: Capture) -> Difference:
    """Count the pairs of initial tensors, or experts of a stack, drawn from the same stream.

    Scaled copies count too: the standard deviation is no part of a stream. Constant tensors are not
    drawn. The parameters of modules are compared with each other only: layer n of the modules and
    MoE layer n of the model draw their routers from one key; another would change their runs.
    """
    streams: dict[tuple[bool, bytes], str] = {}
    pairs = list[str]()
    for name, array, _ in _pairs("initial/", actual, actual):
        for where, own, _ in _by_expert(name, array, array):
            prefix = own.astype(np.float64).ravel()[:DRAWN_PREFIX]
            if len(prefix) < DRAWN_PREFIX or np.ptp(prefix) == 0:
                continue
            drawn = np.round(prefix / np.linalg.norm(prefix), 5).tobytes()
            stream = (".modular." in where, drawn)
            if stream in streams:
                pairs.append(f"{where} is drawn like {streams[stream]}")
            streams.setdefault(stream, where)
    where = pairs[0] if pairs else ""
    return Difference("initial draws", where, float(len(pairs)), exact=True)
