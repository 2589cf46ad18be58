"""Two captures -> what differs, how much, and where.

A difference of floating-point arrays is relative: |a - b| / |b| over a whole tensor, or over one expert's slice of it.

Letters: T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmoe.verify.capture import Capture

Array = NDArray[np.generic]

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
FLOAT32_AFTER_ADAM = 1e-4
"""Adam's first step is g / (|g| + eps): where a gradient is near eps = 1e-8 it turns float32's rounding of g into a difference of a
good part of the learning rate. Seen on sound code: up to 6e-5 of the parameters' norm, with every gradient equal to 1e-6."""
"""The relative difference that is allowed where nothing is exact, by the dtype of the arithmetic."""

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
"""In the order of cause and effect: the first that differs is the one to look at."""


@dataclass(frozen=True)
class Difference:
    quantity: str
    where: str
    size: float
    """Relative; for exact quantities the number of entries that differ."""
    exact: bool = False
    ratio: float | None = None
    """The factor between the two, where one number explains all of the difference."""
    finding: str = ""
    """What else was seen, in words; see causes.py."""


def tolerance(quantity: str, dtype: str) -> float:
    """The largest relative difference that is still called equal."""
    after_adam = quantity == "parameters after two steps" and dtype == "float32"
    return FLOAT32_AFTER_ADAM if after_adam else TOLERANCE[dtype]


def compare(mine: Capture, truth: Capture, rank: int, world: int) -> list[Difference]:
    """The worst difference of every quantity, also where it is zero. `mine` is rank `rank`'s capture of `world`."""
    found = [_worst("initial weights", _pairs("initial/", mine, truth))]
    found.append(_slots(mine, truth, world))
    found.append(_dropped(mine, truth, rank, world))
    found.append(_exact("counts", "MoE layer, expert", mine["counts"], truth["counts"]))
    found.extend(
        _exact("counts", f"modules, place {n}", a, b) for n, a, b in _pairs("modules/", mine, truth)
    )
    found.append(_worst("loss", [("", mine["loss"], truth["loss"])]))
    found.append(_worst("auxiliary losses", _pairs("aux/", mine, truth)))
    gradients = _pairs("gradient/", mine, truth)
    found.append(_worst("router gradient", [p for p in gradients if ".router." in p[0]]))
    found.append(
        _worst(
            "expert gradients",
            [slice_ for p in gradients if ".experts." in p[0] for slice_ in _by_expert(*p)],
        )
    )
    found.append(
        _worst(
            "dense gradients",
            [p for p in gradients if ".router." not in p[0] and ".experts." not in p[0]],
        )
    )
    found.append(_worst("global norm", [("", mine["norm"], truth["norm"])]))
    found.append(_worst("clip coefficient", [("", mine["clip"], truth["clip"])]))
    found.extend(_exact("bias", f"MoE layer {n}", a, b) for n, a, b in _pairs("bias/", mine, truth))
    found.append(_worst("parameters after two steps", _pairs("final/model.", mine, truth)))
    return found


def compare_exactly(quantity: str, mine: Capture, truth: Capture) -> Difference:
    """Weights and moments after a checkpoint's journey: every bit."""
    missing = sorted(mine.keys() ^ truth.keys())
    if missing:
        return Difference(quantity, missing[0], float(len(missing)), exact=True, finding="missing")
    return max(
        (_exact(quantity, name, mine[name], truth[name]) for name in truth), key=lambda d: d.size
    )


def _pairs(prefix: str, mine: Capture, truth: Capture) -> list[tuple[str, Array, Array]]:
    names = sorted(name for name in mine.keys() | truth.keys() if name.startswith(prefix))
    empty = np.zeros(0)
    return [
        (name.removeprefix(prefix), mine.get(name, empty), truth.get(name, empty)) for name in names
    ]


def _by_expert(name: str, mine: Array, truth: Array) -> list[tuple[str, Array, Array]]:
    if mine.shape != truth.shape or truth.ndim < 3:  # a matrix of one expert is a tensor of its own
        return [(name, mine, truth)]
    return [(f"{name} of expert {e}", mine[e], truth[e]) for e in range(len(truth))]


def _worst(quantity: str, pairs: list[tuple[str, Array, Array]]) -> Difference:
    found = [_difference(quantity, *pair) for pair in pairs]
    return max(found, key=lambda d: d.size, default=Difference(quantity, "", 0.0))


def _difference(quantity: str, where: str, mine: Array, truth: Array) -> Difference:
    if mine.shape != truth.shape:
        return Difference(quantity, where, np.inf, finding=f"shape {mine.shape}, not {truth.shape}")
    a, b = mine.astype(np.float64).ravel(), truth.astype(np.float64).ravel()
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


def _exact(quantity: str, where: str, mine: Array, truth: Array) -> Difference:
    if mine.shape != truth.shape:
        return Difference(
            quantity, where, np.inf, exact=True, finding=f"shape {mine.shape}, not {truth.shape}"
        )
    different = np.argwhere(mine != truth)
    if not len(different):
        return Difference(quantity, where, 0.0, exact=True)
    first = tuple(int(i) for i in different[0])
    there = f"{where} {first}: {mine[first]}, not {truth[first]}"
    a, b = float(mine.astype(np.float64).sum()), float(truth.astype(np.float64).sum())
    return Difference(
        quantity, there, float(len(different)), exact=True, ratio=a / b if b else None
    )


def _slots(mine: Capture, truth: Capture, world: int) -> Difference:
    """Slots offered to all ranks together: each rank's share times the world, since all must offer the same."""
    for name in sorted(name for name in truth if name.startswith("slots/")):
        offered, wanted = (
            float(mine[name].astype(np.float64)) * world,
            float(truth[name].astype(np.float64)),
        )
        if offered != wanted:
            return Difference(
                "capacity slots",
                f"{offered:g} in all, not {wanted:g}",
                1.0,
                exact=True,
                ratio=offered / wanted,
            )
    return Difference("capacity slots", "", 0.0, exact=True)


def _dropped(mine: Capture, truth: Capture, rank: int, world: int) -> Difference:
    """This rank's rows of the reference's [T, E]; equal counts with other tokens are told apart from other counts."""
    for name in sorted(name for name in truth if name.startswith("kept/")):
        tokens = len(truth[name]) // world
        here = truth[name][rank * tokens : (rank + 1) * tokens]
        if mine[name].shape != here.shape:
            return Difference(
                "dropped set",
                name,
                np.inf,
                exact=True,
                finding=f"shape {mine[name].shape}, not {here.shape}",
            )
        if (mine[name] != here).any():
            token, expert = (int(i) for i in np.argwhere(mine[name] != here)[0])
            _, step, layer = name.split("/")
            what = "kept" if mine[name][token, expert] else "dropped"
            where = f"accumulation step {step}, MoE layer {layer}, token {rank * tokens + token}, expert {expert}: {what} here"
            same = bool((mine[name].sum(0) == here.sum(0)).all())
            finding = "same numbers, other tokens" if same else ""
            return Difference(
                "dropped set", where, float((mine[name] != here).sum()), exact=True, finding=finding
            )
    return Difference("dropped set", "", 0.0, exact=True)
