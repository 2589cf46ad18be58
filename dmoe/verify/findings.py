"""What the ranks of a case found: differences from the reference, and ties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dmoe.verify import ties
from dmoe.verify.cases import NUM_STEPS, Case
from dmoe.verify.differences import Difference, mark_consequences


@dataclass(frozen=True)
class Findings:
    """Differences and ties of some cases."""

    differences: list[tuple[Case, Difference]] = field(default_factory=list)
    undecided: dict[str, str] = field(default_factory=dict)

    def __add__(self, other: Findings) -> Findings:
        return Findings(self.differences + other.differences, self.undecided | other.undecided)


@dataclass(frozen=True)
class RankFindings:
    """Differences that one rank found in one case; `routing` is None if it broke the rules."""

    differences: list[Difference]
    routing: list[ties.UnitDifference] | None


def merge_ranks(case: Case, ranks: Sequence[RankFindings], dtype: str) -> Findings:
    """Merge the findings of all ranks, without the quantities that follow from a tie.

    Tied scores are equal to the last bit in the first step only: experts that no token takes get
    gradients that are equal but for rounding. So the second step's routing is left out.
    """
    tie = ties.find_tie([rank.routing for rank in ranks])
    undecided = tie.step if tie else 1 if case.tied else NUM_STEPS
    merged = mark_consequences([d for rank in ranks for d in rank.differences], dtype)
    found = [(case, d) for d in merged if not ties.is_affected(d, undecided)]
    return Findings(found, {str(case): str(tie)} if tie else {})
