"""Compare two captures: the differing quantities, by how much, and where.

The difference of floating-point arrays is relative: |a - b| / |b| over a full tensor, or over one
expert's slice of it.

Letters: T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmoe.verify.capture import Capture

Array = NDArray[np.generic]

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
"""Allowed relative difference of quantities that are not exact, by the dtype of the arithmetic."""
FLOAT32_AFTER_ADAM = 1e-4
"""Allowed relative difference of float32 parameters after two steps.

Adam's first step is g / (|g| + eps): if a gradient is near eps = 1e-8, float32's rounding of g
becomes a large part of the learning rate. Measured on correct code: up to 6e-5 of the norm of the
parameters, with every gradient equal to 1e-6."""

QUANTITIES = (
    "initial weights",
    "capacity slots",
    "dropped set",
    "counts",
    "loss",
    "auxiliary losses",
    "router gradient",
    "expert gradients",
    "dense gradients",
    "global norm",
    "clip coefficient",
    "bias",
    "parameters after two steps",
    "checkpoint written here, read by 1",
    "checkpoint written by 1, read here",
    "every rank finishes",
)
"""Compared quantities in order of cause and effect: examine the first that differs."""


@dataclass(frozen=True)
class Difference:
    """Difference of one quantity between a case and the reference."""

    quantity: str
    where: str
    size: float
    """Relative; for exact quantities the number of entries that differ."""
    exact: bool = False
    ratio: float | None = None
    """Factor between the two, if one factor explains all of the difference."""
    finding: str = ""
    """Further observation, a phrase that causes.py reads."""


def tolerance(quantity: str, dtype: str) -> float:
    """Return the largest relative difference that counts as equal."""
    after_adam = quantity == "parameters after two steps" and dtype == "float32"
    return FLOAT32_AFTER_ADAM if after_adam else TOLERANCE[dtype]


def compare(actual: Capture, expected: Capture, rank: int, world: int) -> list[Difference]:
    """Return the largest difference of every quantity, zero included.

    Args:
        actual: capture of one rank.
        expected: capture of the reference.
        rank: the rank that made `actual`.
        world: number of ranks.
    """
    found = [_worst("initial weights", _pairs("initial/", actual, expected))]
    found.append(_slots(actual, expected, world))
    found.append(_dropped(actual, expected, rank, world))
    found.append(_exact("counts", "MoE layer, expert", actual["counts"], expected["counts"]))
    found.extend(
        _exact("counts", f"adapter layer {n}", a, b)
        for n, a, b in _pairs("modules/", actual, expected)
    )
    found.append(_worst("loss", [("", actual["loss"], expected["loss"])]))
    found.append(_worst("auxiliary losses", _pairs("aux/", actual, expected)))
    gradients = _pairs("gradient/", actual, expected)
    found.append(_worst("router gradient", [p for p in gradients if ".router." in p[0]]))
    found.append(
        _worst(
            "expert gradients",
            [pair for p in gradients if ".experts." in p[0] for pair in _by_expert(*p)],
        )
    )
    found.append(
        _worst(
            "dense gradients",
            [p for p in gradients if ".router." not in p[0] and ".experts." not in p[0]],
        )
    )
    found.append(_worst("global norm", [("", actual["norm"], expected["norm"])]))
    found.append(_worst("clip coefficient", [("", actual["clip"], expected["clip"])]))
    found.extend(
        _exact("bias", f"MoE layer {n}", a, b) for n, a, b in _pairs("bias/", actual, expected)
    )
    found.append(_worst("parameters after two steps", _pairs("final/model.", actual, expected)))
    return found


def compare_exactly(quantity: str, actual: Capture, expected: Capture) -> Difference:
    """Compare weights and moments after saving and loading, bit by bit."""
    missing = sorted(actual.keys() ^ expected.keys())
    if missing:
        return Difference(quantity, missing[0], float(len(missing)), exact=True, finding="missing")
    return max(
        (_exact(quantity, name, actual[name], expected[name]) for name in expected),
        key=lambda d: d.size,
    )


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


def _worst(quantity: str, pairs: list[tuple[str, Array, Array]]) -> Difference:
    found = [_difference(quantity, *pair) for pair in pairs]
    return max(found, key=lambda d: d.size, default=Difference(quantity, "", 0.0))


def _difference(quantity: str, where: str, actual: Array, expected: Array) -> Difference:
    if actual.shape != expected.shape:
        return Difference(
            quantity, where, np.inf, finding=f"shape {actual.shape}, not {expected.shape}"
        )
    a, b = actual.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    scale = float(np.linalg.norm(b))
    gap = float(np.linalg.norm(a - b))
    if gap == 0.0:
        return Difference(quantity, where, 0.0)
    if not np.isfinite(gap):
        return Difference(quantity, where, np.inf, finding="not finite")
    size = gap / scale if scale > 0 else np.inf
    ratio = float(a @ b) / scale**2 if scale > 0 else None
    explained = (
        ratio is not None and size > 1e-6 and float(np.linalg.norm(a - ratio * b)) < 1e-4 * gap
    )
    return Difference(
        quantity,
        where,
        size,
        ratio=ratio if explained else None,
        finding="all zero" if not a.any() else "",
    )


def _exact(quantity: str, where: str, actual: Array, expected: Array) -> Difference:
    if actual.shape != expected.shape:
        return Difference(
            quantity,
            where,
            np.inf,
            exact=True,
            finding=f"shape {actual.shape}, not {expected.shape}",
        )
    different = np.argwhere(actual != expected)
    if not len(different):
        return Difference(quantity, where, 0.0, exact=True)
    first = tuple(int(i) for i in different[0])
    place = f"{where} {first}: {actual[first]}, not {expected[first]}"
    a, b = float(actual.astype(np.float64).sum()), float(expected.astype(np.float64).sum())
    return Difference(
        quantity, place, float(len(different)), exact=True, ratio=a / b if b else None
    )


def _slots(actual: Capture, expected: Capture, world: int) -> Difference:
    """Compare the slots of all ranks: those of one rank times the number of ranks."""
    for name in sorted(name for name in expected if name.startswith("slots/")):
        slots = float(actual[name].astype(np.float64)) * world
        expected_slots = float(expected[name].astype(np.float64))
        if slots != expected_slots:
            return Difference(
                "capacity slots",
                f"{slots:g} in all, not {expected_slots:g}",
                1.0,
                exact=True,
                ratio=slots / expected_slots,
            )
    return Difference("capacity slots", "", 0.0, exact=True)


def _dropped(actual: Capture, expected: Capture, rank: int, world: int) -> Difference:
    """Compare the kept choices of this rank's tokens with the reference's rows of them [T, E].

    The finding separates equal counts of other tokens from other counts.
    """
    for name in sorted(name for name in expected if name.startswith("kept/")):
        tokens = len(expected[name]) // world
        own = expected[name][rank * tokens : (rank + 1) * tokens]
        if actual[name].shape != own.shape:
            return Difference(
                "dropped set",
                name,
                np.inf,
                exact=True,
                finding=f"shape {actual[name].shape}, not {own.shape}",
            )
        if (actual[name] != own).any():
            token, expert = (int(i) for i in np.argwhere(actual[name] != own)[0])
            _, step, layer = name.split("/")
            outcome = "kept" if actual[name][token, expert] else "dropped"
            where = (
                f"accumulation step {step}, MoE layer {layer}, token {rank * tokens + token}, "
                f"expert {expert}: {outcome} here"
            )
            same = bool((actual[name].sum(0) == own.sum(0)).all())
            finding = "same numbers, other tokens" if same else ""
            return Difference(
                "dropped set",
                where,
                float((actual[name] != own).sum()),
                exact=True,
                finding=finding,
            )
    return Difference("dropped set", "", 0.0, exact=True)
