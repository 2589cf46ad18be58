"""Differences: how far two arrays are apart, and which differences follow from others.

The difference of floating-point arrays is relative: |a - b| / |b| over a full tensor, or over one
expert's slice of it.

Letters: T tokens, E experts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dmoe.verify.decisions import Capture

Array = NDArray[np.generic]

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
"""Allowed relative difference of quantities that are not exact, by the dtype of the arithmetic."""
FLOAT32_AFTER_ADAM = 1e-4
"""Allowed relative difference of float32 parameters after a step, and of all that follows.

Adam's first step is g / (|g| + eps): if a gradient is near eps = 1e-8, float32's rounding of g
becomes a large part of the learning rate. Measured on correct code: up to 6e-5 of the norm of the
parameters, with every gradient equal to 1e-6."""

FORWARD = {
    "module outputs": "module",
    "layer inputs": "x",
    "router scores": "score",
    "capacity slots": "slots",
    "chosen experts": "chosen",
    "dropped set": "computed",
    "combine weights": "weight",
    "layer outputs": "y",
}
"""Record of `decisions.py` by quantity, in the order in which a layer computes them."""
BACKWARD = {"output gradients": "dy", "input gradients": "dx"}
EXACT = ("samples", "capacity slots", "chosen experts", "dropped set", "counts", "bias")
QUANTITIES = (
    "initial weights",
    "initial draws",
    "samples",
    *FORWARD,
    "counts",
    "loss",
    "auxiliary losses",
    "output gradients",
    "expert gradients",
    "router gradient",
    "input gradients",
    "dense gradients",
    "global norm",
    "clip coefficient",
    "learning rate",
    "bias",
    "moments",
    "parameters after two steps",
    "evaluation",
    "float32 under bf16",
    "checkpoint written here, read by 1",
    "checkpoint written by 1, read here",
    "every rank finishes",
)
"""Compared quantities in order of cause and effect: examine the first that differs."""
AFTER_ADAM = ("parameters after two steps", "moments", "evaluation")


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
    step: int = 0
    layer: float = -1
    """Index of the MoE layer; -1 if the quantity belongs to none; for modules between layer n and
    the next n + 0.5."""
    follows: bool = False
    """Another difference of the case explains it."""

    def is_red(self, dtype: str) -> bool:
        """Return True if it is more than rounding."""
        return self.size > (0.0 if self.exact else tolerance(self.quantity, dtype, self.step))


def tolerance(quantity: str, dtype: str, step: int = 0) -> float:
    """Return the largest relative difference that counts as equal."""
    after_adam = dtype == "float32" and (quantity in AFTER_ADAM or step > 0)
    return FLOAT32_AFTER_ADAM if after_adam else TOLERANCE[dtype]


STAGES: tuple[tuple[str, ...], ...] = (
    ("initial weights",),
    ("samples",),
    tuple(FORWARD),
    ("counts", "loss", "auxiliary losses"),
    ("output gradients", "expert gradients", "router gradient", "input gradients",
     "dense gradients"),
    ("global norm",),
    ("clip coefficient",),
    ("learning rate", "bias"),
    ("moments",),
    ("parameters after two steps",),
    ("evaluation",),
)  # fmt: skip
"""Quantities of a step that follow from each other, stage by stage."""


def mark_consequences(found: Sequence[Difference], dtype: str) -> list[Difference]:
    """Return the differences of one case, of all ranks, with `follows` set.

    A later layer's differences follow from an earlier one's in the forward, and the reverse in the
    backward; a later stage's from an earlier one's, and a later step's from an earlier step's.
    """
    red = [d for d in found if d.is_red(dtype) and _stage(d) is not None]
    causes = [(_stage(d), d) for d in {(d.quantity, d.step, d.layer): d for d in red}.values()]
    disagreeing = {d.step for d in red if d.quantity in BACKWARD}

    def follows(d: Difference) -> bool:
        stage = _stage(d)
        return (
            stage is not None
            and d.is_red(dtype)
            and any(
                _explains(cause, cause_stage, d, stage, d.step not in disagreeing)
                for cause_stage, cause in causes
                if cause_stage is not None
            )
        )

    return [replace(d, follows=True) if follows(d) else d for d in found]


def _stage(difference: Difference) -> int | None:
    return next((n for n, names in enumerate(STAGES) if difference.quantity in names), None)


def _explains(
    cause: Difference, cause_stage: int, d: Difference, stage: int, activations_agree: bool
) -> bool:
    """Return True if `d` follows from `cause`, both red."""
    if (cause.step, cause_stage) != (d.step, stage):
        return (cause.step, cause_stage) < (d.step, stage)
    place = STAGES[stage].index(d.quantity), STAGES[stage].index(cause.quantity)
    if cause.quantity in FORWARD:
        return cause.layer < d.layer or (cause.layer == d.layer and place[1] < place[0])
    if stage != _stage(Difference("dense gradients", "", 0.0)):
        return False
    if activations_agree:
        # the sum over ranks of one kind of gradient; routers are dense parameters
        return d.quantity == "router gradient" and cause.quantity == "dense gradients"
    if d.layer < 0:
        return cause.quantity in BACKWARD
    if cause.layer != d.layer:
        return cause.layer > d.layer and cause.quantity in BACKWARD
    return place[1] < place[0] and (cause.quantity in BACKWARD or d.quantity in BACKWARD)


def compare_exactly(quantity: str, actual: Capture, expected: Capture) -> Difference:
    """Compare weights and moments after saving and loading, bit by bit."""
    missing = sorted(actual.keys() ^ expected.keys())
    if missing:
        return Difference(quantity, missing[0], float(len(missing)), exact=True, finding="missing")
    return max(
        (exact_difference(quantity, name, actual[name], expected[name]) for name in expected),
        key=lambda d: d.size,
    )


def write(path: Path, found: Sequence[Difference]) -> None:
    """Write differences to a file."""
    path.write_text(json.dumps([asdict(difference) for difference in found]), encoding="utf-8")


def read(path: Path) -> list[Difference]:
    """Read the differences that `write` wrote."""
    return [Difference(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))]


def failure_of(message: str, quantity: str | None = None) -> Difference:
    """Return the difference of a process that raised, with the place in dmoe.

    Args:
        message: with the traceback; its last line may name the quantity at work as [quantity].
        quantity: the quantity at work, if it is known.
    """
    last_line = message.strip().splitlines()[-1]
    named = next((q for q in QUANTITIES if f"[{q}]" in last_line), "every rank finishes")
    frames = re.findall(
        r'File ".*/(dmoe/(?!verify/|distributed/local_ranks).*)", line (\d+)', message
    )
    place = "raised" + "".join(f" in {file}, line {line}" for file, line in frames[-1:])
    return Difference(quantity or named, last_line, math.inf, exact=True, finding=place)


def multiple_of(actual: Array, expected: Array, part: Array) -> float | None:
    """Return s with `actual - expected = s * part`, if there is one."""
    gap = (actual.astype(np.float64) - expected.astype(np.float64)).ravel()
    base = part.astype(np.float64).ravel()
    if not base.any():
        return None
    share = float(gap @ base / (base @ base))
    rest = float(np.linalg.norm(gap - share * base))
    return share if rest < 1e-3 * float(np.linalg.norm(gap)) else None


def difference_of(quantity: str, where: str, actual: Array, expected: Array) -> Difference:
    """Return the relative difference of two arrays."""
    if actual.shape != expected.shape:
        return Difference(
            quantity, where, np.inf, finding=f"shape {actual.shape}, not {expected.shape}"
        )
    a, b = (x.astype(np.float64, copy=False).ravel() for x in (actual, expected))
    gap = float(np.linalg.norm(a - b))
    if gap == 0.0:
        return Difference(quantity, where, 0.0)
    if not np.isfinite(gap):
        return Difference(quantity, where, np.inf, finding="not finite")
    scale = float(np.linalg.norm(b))
    size = gap / scale if scale > 0 else np.inf
    if size <= 1e-6:
        return Difference(quantity, where, size)
    ratio = float(a @ b) / scale**2 if scale > 0 else None
    explained = ratio is not None and float(np.linalg.norm(a - ratio * b)) < 1e-4 * gap
    return Difference(
        quantity,
        where,
        size,
        ratio=ratio if explained else None,
        finding="all zero" if not a.any() else "",
    )


def exact_difference(quantity: str, where: str, actual: Array, expected: Array) -> Difference:
    """Return the number of entries that differ; NaN equals NaN."""
    if actual.shape != expected.shape:
        return Difference(
            quantity,
            where,
            np.inf,
            exact=True,
            finding=f"shape {actual.shape}, not {expected.shape}",
        )
    same = (actual == expected) | ((actual != actual) & (expected != expected))
    different = np.argwhere(~same)
    if not len(different):
        return Difference(quantity, where, 0.0, exact=True)
    first = tuple(int(i) for i in different[0])
    place = f"{where} {first}: {actual[first]}, not {expected[first]}"
    a, b = (
        float(np.nansum(actual.astype(np.float64))),
        float(np.nansum(expected.astype(np.float64))),
    )
    return Difference(
        quantity, place, float(len(different)), exact=True, ratio=a / b if b else None
    )


def choices_difference(
    quantity: str, where: str, actual: Array, expected: Array, rank: int
) -> Difference:
    """Compare experts of this rank's tokens [T, E]; the finding tells equal counts from others."""
    if actual.shape != expected.shape or not (actual != expected).any():
        return exact_difference(quantity, where, actual, expected)
    token, expert = (int(i) for i in np.argwhere(actual != expected)[0])
    outcome = "taken" if actual[token, expert] else "not taken"
    same = bool((actual.sum(0) == expected.sum(0)).all())
    return Difference(
        quantity,
        f"{where}, token {rank * len(actual) + token}, expert {expert}: {outcome} here",
        float((actual != expected).sum()),
        exact=True,
        finding="same numbers, other tokens" if same else "",
    )
