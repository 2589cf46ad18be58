"""In float32 two scores can be closer than rounding; then another choice than the reference's is no error. Which differences are that?

A float32 logit is a sum of D products. Each product and each partial sum is rounded, by eps/2 at the most, with signs that fall at
random, so the sum is off by some sqrt(D) eps times its size (the worst case, D eps, does not happen); the same holds for the sums
before it that made the router's input. Allowed between a logit here and in the reference is therefore

    delta = 2 sqrt(D) eps max(1, largest logit of the token)            eps = 2^-23;  D = 32: 1.3e-6

and in the second step, whose weights come from the first step's float32 sums, 1e-5 of that size more (what `parameters after two
steps` allows). Softmax and sigmoid turn an error delta of the logits into at most 2 delta times the score: that is how close a score
must be to the reference's.

Tokens influence each other inside a unit: the sequences that share a capacity, or one sequence. In each unit only the first layer whose
choices or slots differ is judged: what is after it follows from it. The difference there is a tie if

    every score of the unit in that layer is as close to the reference's as said above, with the same bias, and
    everywhere in the case the rank chose and served what the naive rules make of its own scores (`lawful`, see decisions.py).

Then only the last digits of the scores stand between the two. A rank that breaks the rules, or scores differently, has no tie.

Letters: T tokens, D width, E experts, U tokens a unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmoe.config.schema import Config
from dmoe.train.tasks import task_of
from dmoe.verify.capture import Capture
from dmoe.verify.compare import QUANTITIES, TOLERANCE

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

ROUNDING = 2.0
EPS = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Finding:
    """The first difference of one unit of tokens."""

    step: int
    part: int
    """Accumulation step."""
    unit: int
    layer: int
    tie: bool
    what: str

    def __str__(self) -> str:
        return f"a tie: {self.what} (step {self.step}, accumulation step {self.part}, MoE layer {self.layer})"


def closeness(size_T: Floats, width: int, step: int) -> Floats:
    """[T]: delta of the module's docstring, for tokens whose largest logit is `size_T`."""
    inherited = TOLERANCE["float32"] if step else 0.0
    allowed_T: Floats = (ROUNDING * math.sqrt(width) * EPS + inherited) * np.maximum(1.0, size_T)
    return allowed_T


def unit_size(config: Config, tokens: int, groups: int) -> int:
    """How many of one accumulation step's `tokens` (of all ranks) share their fate: U. `groups`: ranks times virtual ranks."""
    moe, positions = config.moe, task_of(config, outputs=0).targets
    queues = moe.capacity.factor is not None or moe.router.kind == "expert_choice"
    shared = moe.capacity.group if queues else "sequence"
    return {"rank": tokens // groups, "sequence": positions, "global": tokens}[shared]


def judge(
    mine: Capture, truth: Capture, rank: int, config: Config, groups: int
) -> list[Finding] | None:
    """The first difference of every unit, as far as rank `rank` sees; None if this rank broke the rules. `mine` is its capture."""
    if not _lawful(mine, truth):
        return None
    found: dict[tuple[int, int, int], Finding] = {}
    places = sorted(
        tuple(int(n) for n in name.split("/")[1:]) for name in truth if name.startswith("chosen/")
    )
    for step, part, layer in places:
        place = f"{step}/{part}/{layer}"
        here = len(mine[f"chosen/{place}"])
        size = unit_size(config, len(truth[f"chosen/{place}"]), groups)
        for start in range(0, here, min(size, here)):
            first = rank * here + start
            key = step, part, first // size
            both = _Both(
                mine,
                truth,
                place,
                slice(start, start + size),
                slice(first, first + min(size, here)),
            )
            if key not in found and both.differ():
                found[key] = Finding(
                    *key,
                    layer,
                    both.close(closeness(both.size_T, config.model.dim, step)),
                    both.sentence(),
                )
    return list(found.values())


def _lawful(mine: Capture, truth: Capture) -> bool:
    """Whether this rank followed the rules everywhere, with an equal share of the reference's tokens."""
    shares = {len(truth[name]) / len(mine[name]) for name in truth if name.startswith("chosen/")}
    return len(shares) <= 1 and all(
        array.all() for name, array in mine.items() if name.startswith("lawful/")
    )


def decide(ranks: list[list[Finding] | None]) -> Finding | None:
    """From what all ranks of a case found: the tie that explains it, or None if nothing differs or something is no tie."""
    found = [finding for own in ranks for finding in own or []]
    if not found or any(own is None for own in ranks):
        return None
    step = min(
        finding.step for finding in found
    )  # in the next one everything follows: the weights are others
    first: dict[tuple[int, int], int] = {}
    for one in found:
        if one.step == step:
            first[one.part, one.unit] = min(one.layer, first.get((one.part, one.unit), one.layer))
    causes = [one for one in found if one.step == step and one.layer == first[one.part, one.unit]]
    return (
        min(causes, key=lambda one: (one.part, one.layer, one.unit))
        if all(one.tie for one in causes)
        else None
    )


def following(step: int) -> tuple[str, ...]:
    """The quantities that follow from a choice in step `step` (0 or 1): with another choice they are others."""
    first, last = (
        QUANTITIES.index("dropped set" if step == 0 else "bias"),
        QUANTITIES.index("parameters after two steps"),
    )
    return QUANTITIES[first : last + 1]


class _Both:
    """One unit of one layer: this rank's rows and the same rows of the reference."""

    def __init__(
        self, mine: Capture, truth: Capture, place: str, rows: slice, truth_rows: slice
    ) -> None:
        self.first: int = truth_rows.start
        self.size_T: Floats = truth[f"size/{place}"][truth_rows].astype(np.float64)
        self.offset: tuple[Floats, Floats] = (
            _floats(mine[f"offset/{place}"]),
            _floats(truth[f"offset/{place}"]),
        )
        self.score = (
            _floats(mine[f"score/{place}"][rows]),
            _floats(truth[f"score/{place}"][truth_rows]),
        )
        self.chosen = (
            _bools(mine[f"chosen/{place}"][rows]),
            _bools(truth[f"chosen/{place}"][truth_rows]),
        )
        self.served = (
            _bools(mine[f"served/{place}"][rows]),
            _bools(truth[f"served/{place}"][truth_rows]),
        )

    def differ(self) -> bool:
        return any(not np.array_equal(*pair) for pair in (self.chosen, self.served))

    def close(self, allowed_T: Floats) -> bool:
        """Whether all scores are as close as rounding leaves them, and the bias is the same."""
        mine_TE, truth_TE = self.score
        if mine_TE.shape != truth_TE.shape or not np.array_equal(*self.offset):
            return False
        allowed_TE = 2 * allowed_T[:, None] * np.maximum(mine_TE, truth_TE)
        return bool((np.abs(mine_TE - truth_TE) <= allowed_TE).all())

    def sentence(self) -> str:
        """Who was exchanged for whom, and how far apart the two scores are; where it is no exchange, how far from the reference's."""
        chosen = not np.array_equal(*self.chosen)
        mine_TE, truth_TE = self.chosen if chosen else self.served
        more_TE, fewer_TE = mine_TE & ~truth_TE, truth_TE & ~mine_TE
        ranked_TE = self.score[0] + (self.offset[0] if chosen else 0.0)
        t = int(np.flatnonzero((more_TE | fewer_TE).any(1))[0])
        here, there = np.flatnonzero(more_TE[t]), np.flatnonzero(fewer_TE[t])
        if chosen and len(here) == len(there) == 1:
            gap = abs(ranked_TE[t, here[0]] - ranked_TE[t, there[0]])
            return f"token {self.first + t} chose expert {here[0]} here and {there[0]} in the reference, scores differ by {gap:.0e}"
        e = int([*here, *there][0])
        ours, theirs = np.flatnonzero(more_TE[:, e]), np.flatnonzero(fewer_TE[:, e])
        if len(ours) == len(theirs) == 1:
            gap, a, b = (
                abs(ranked_TE[ours[0], e] - ranked_TE[theirs[0], e]),
                self.first + ours[0],
                self.first + theirs[0],
            )
            return f"expert {e} took token {a} here and token {b} in the reference, scores differ by {gap:.0e}"
        gap = float(np.abs(self.score[0][t] - self.score[1][t]).max())
        where = f"experts {here.tolist()} only here and {there.tolist()} only in the reference"
        return (
            f"token {self.first + t} went to {where}, its scores are the reference's to {gap:.0e}"
        )


def _floats(array: NDArray[np.generic]) -> Floats:
    return array.astype(np.float64)


def _bools(array: NDArray[np.generic]) -> Bools:
    return array.astype(np.bool_)
