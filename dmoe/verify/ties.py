"""Float32 ties: routing that differs from the reference only because of rounding.

A float32 logit is a sum of D products. Each product and partial sum is rounded by at most eps/2
with random sign, so the sum is off by about sqrt(D) eps times its size (the worst case, D eps, does
not occur); the sums before it, which made the router's input, add the same. The tolerance between a
logit and the reference's is therefore

    delta = 2 sqrt(D) eps max(1, largest logit of the token)      eps = 2^-23;  D = 32: 1.3e-6

and in the second step, whose weights come from the float32 sums of the first, 1e-5 of that size
more (the tolerance of `parameters after two steps`). Softmax and sigmoid turn an error delta of the
logits into at most 2 delta times the score: the tolerance between scores.

Tokens depend on each other inside a unit: the sequences that share a capacity, or one sequence. Of
each unit, only the first layer whose choices or slots differ is examined: later differences follow
from it. That difference is a tie if

    every score of the unit in that layer is within the tolerance, with the same bias, and
    everywhere in the case the rank chose and kept what the naive rules make of its own scores
    (`follows_rules`, see decisions.py).

A rank that breaks the rules, or has other scores, has no tie.

Letters: T tokens, D width, E experts, U tokens per unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmoe.config.router_kinds import router_spec
from dmoe.config.schema import Config
from dmoe.train.tasks import task_of
from dmoe.verify.decisions import Capture
from dmoe.verify.differences import STAGES, TOLERANCE, Difference

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

ROUNDING_FACTOR = 2.0
EPS = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class UnitDifference:
    """First difference of one unit of tokens."""

    step: int
    micro_step: int
    """Accumulation step."""
    unit: int
    layer: int
    is_tie: bool
    description: str

    def __str__(self) -> str:
        place = f"step {self.step}, accumulation step {self.micro_step}, MoE layer {self.layer}"
        return f"a tie: {self.description} ({place})"


def logit_tolerance(max_logit_T: Floats, width: int, step: int) -> Floats:
    """Return delta [T] of the module's docstring."""
    inherited = TOLERANCE["float32"] if step else 0.0
    relative = ROUNDING_FACTOR * math.sqrt(width) * EPS + inherited
    tolerance_T: Floats = relative * np.maximum(1.0, max_logit_T)
    return tolerance_T


def unit_size(config: Config, tokens: int, groups: int) -> int:
    """Return U, the number of tokens whose choices depend on each other.

    Args:
        config: of the case.
        tokens: number of tokens of all ranks in one accumulation step.
        groups: ranks times virtual ranks.
    """
    moe, positions = config.moe, task_of(config, num_outputs=0).targets_per_sample
    # a router that looks ahead gives each expert a capacity of its own
    has_queues = moe.capacity.factor is not None or router_spec(moe.router.kind).looks_ahead
    shared_by = moe.capacity.group if has_queues else "sequence"
    return {"rank": tokens // groups, "sequence": positions, "global": tokens}[shared_by]


def first_differences(
    actual: Capture, expected: Capture, rank: int, config: Config, groups: int
) -> list[UnitDifference] | None:
    """Return the first difference of every unit, within the tokens of one rank.

    Args:
        actual: capture of `rank`.
        expected: capture of the reference, all tokens.
        rank: the rank.
        config: of the case.
        groups: ranks times virtual ranks.

    Returns:
        The differences; None if this rank broke the rules.
    """
    if not _follows_rules(actual, expected):
        return None
    found: dict[tuple[int, int, int], UnitDifference] = {}
    forwards = sorted(
        tuple(int(n) for n in name.split("/")[1:])
        for name in expected
        if name.startswith("max_logit/")
    )
    for step, micro_step, layer in forwards:
        forward = f"{step}/{micro_step}/{layer}"
        tokens = len(actual[f"chosen/{forward}"])
        size = unit_size(config, len(expected[f"chosen/{forward}"]), groups)
        for start in range(0, tokens, min(size, tokens)):
            first = rank * tokens + start
            key = step, micro_step, first // size
            rows = slice(start, start + size)
            expected_rows = slice(first, first + min(size, tokens))
            unit = _Unit(actual, expected, forward, rows, expected_rows)
            if key not in found and unit.differs():
                tolerance_T = logit_tolerance(unit.max_logit_T, config.model.dim, step)
                is_tie = unit.within(tolerance_T)
                found[key] = UnitDifference(*key, layer, is_tie, unit.description())
    return list(found.values())


def _follows_rules(actual: Capture, expected: Capture) -> bool:
    """Return True if the rank has an equal share of the tokens and followed all the rules."""
    shares = {len(expected[n]) / len(actual[n]) for n in expected if n.startswith("max_logit/")}
    return len(shares) <= 1 and all(
        array.all() for name, array in actual.items() if name.startswith("follows_rules/")
    )


def find_tie(ranks: list[list[UnitDifference] | None]) -> UnitDifference | None:
    """Return the tie that explains the differences of all ranks of a case.

    None if nothing differs, or if some first difference is no tie.
    """
    found = [difference for own in ranks for difference in own or []]
    if not found or any(own is None for own in ranks):
        return None
    # the next step has other weights, so all its differences follow from this one
    step = min(difference.step for difference in found)
    found = [difference for difference in found if difference.step == step]
    first: dict[tuple[int, int], int] = {}
    for difference in found:
        unit = difference.micro_step, difference.unit
        first[unit] = min(difference.layer, first.get(unit, difference.layer))
    causes = [d for d in found if d.layer == first[d.micro_step, d.unit]]
    if not all(difference.is_tie for difference in causes):
        return None
    return min(causes, key=lambda d: (d.micro_step, d.layer, d.unit))


def is_affected(difference: Difference, step: int) -> bool:
    """Return True for a difference that a routing choice in step `step` (0 or 1) changes."""
    independent = ("initial draws", "samples", "capacity slots", "learning rate")
    stages = [name for names in STAGES[1:] for name in names]
    quantity = difference.quantity
    return difference.step >= step and quantity in stages and quantity not in independent


class _Unit:
    """One unit in one layer: this rank's rows, and the same rows of the reference."""

    def __init__(
        self, actual: Capture, expected: Capture, forward: str, rows: slice, expected_rows: slice
    ) -> None:
        self.first: int = expected_rows.start
        self.max_logit_T = _floats(expected[f"max_logit/{forward}"][expected_rows])
        self.bias: tuple[Floats, Floats] = (
            _floats(actual[f"router_bias/{forward}"]),
            _floats(expected[f"router_bias/{forward}"]),
        )
        self.score = (
            _floats(actual[f"score/{forward}"][rows]),
            _floats(expected[f"score/{forward}"][expected_rows]),
        )
        self.chosen = (
            _bools(actual[f"chosen/{forward}"][rows]),
            _bools(expected[f"chosen/{forward}"][expected_rows]),
        )
        self.computed = (
            _bools(actual[f"computed/{forward}"][rows]),
            _bools(expected[f"computed/{forward}"][expected_rows]),
        )

    def differs(self) -> bool:
        return any(not np.array_equal(*pair) for pair in (self.chosen, self.computed))

    def within(self, tolerance_T: Floats) -> bool:
        """Return True if all scores are within rounding of the reference's, with equal bias."""
        actual_TE, expected_TE = self.score
        if actual_TE.shape != expected_TE.shape or not np.array_equal(*self.bias):
            return False
        allowed_TE = 2 * tolerance_T[:, None] * np.maximum(actual_TE, expected_TE)
        return bool((np.abs(actual_TE - expected_TE) <= allowed_TE).all())

    def description(self) -> str:
        """Name the exchanged experts or tokens, and the distance of their scores.

        If it is no exchange of one for one, the distance is that to the reference's scores.
        """
        choices_differ = not np.array_equal(*self.chosen)
        actual_TE, expected_TE = self.chosen if choices_differ else self.computed
        added_TE, missing_TE = actual_TE & ~expected_TE, expected_TE & ~actual_TE
        ranked_TE = self.score[0] + (self.bias[0] if choices_differ else 0.0)
        t = int(np.flatnonzero((added_TE | missing_TE).any(1))[0])
        added, missing = np.flatnonzero(added_TE[t]), np.flatnonzero(missing_TE[t])
        if choices_differ and len(added) == len(missing) == 1:
            gap = abs(ranked_TE[t, added[0]] - ranked_TE[t, missing[0]])
            return (
                f"token {self.first + t} chose expert {added[0]} here and {missing[0]} in the "
                f"reference, scores differ by {gap:.0e}"
            )
        e = int([*added, *missing][0])
        added_tokens = np.flatnonzero(added_TE[:, e])
        missing_tokens = np.flatnonzero(missing_TE[:, e])
        if len(added_tokens) == len(missing_tokens) == 1:
            a, b = added_tokens[0], missing_tokens[0]
            gap = abs(ranked_TE[a, e] - ranked_TE[b, e])
            return (
                f"expert {e} took token {self.first + a} here and token {self.first + b} in the "
                f"reference, scores differ by {gap:.0e}"
            )
        gap = float(np.abs(self.score[0][t] - self.score[1][t]).max())
        return (
            f"token {self.first + t} went to experts {added.tolist()} only here and "
            f"{missing.tolist()} only in the reference, its scores are the reference's to {gap:.0e}"
        )


def _floats(array: NDArray[np.generic]) -> Floats:
    return array.astype(np.float64)


def _bools(array: NDArray[np.generic]) -> Bools:
    return array.astype(np.bool_)
