"""The best balance that integer rows allow: what no placement and no copies can go below.

    even(N, W) = ceil(N / W) / (N / W)

is max/mean over W ranks when rows may be split freely. With whole experts on ranks, E / W each, two
bounds hold as well: no rank is below its largest expert, and the rank of the largest expert has
E / W - 1 others, at least the smallest ones.

Letters: E experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence


def max_over_mean(rows_W: Sequence[int]) -> float:
    """Return the straggler factor max/mean of rows per rank, 1 where there are none."""
    total = sum(rows_W)
    return max(rows_W) * len(rows_W) / total if total else 1.0


def best_with_copies(rows: int, ranks: int) -> float:
    """Return the least max/mean over the ranks if any row may go to any rank."""
    return -(-rows // ranks) * ranks / rows if rows else 1.0


def bound_without_copies(rows_E: Sequence[int], ranks: int) -> float:
    """Return a lower bound of max/mean with whole experts, E / W on each rank.

    Args:
        rows_E: of each expert; their number divides by `ranks`.
        ranks: W.
    """
    assert len(rows_E) % ranks == 0, f"{len(rows_E)} experts do not divide by {ranks} ranks"
    total, ascending = sum(rows_E), sorted(rows_E)
    beside_largest = sum(ascending[: len(rows_E) // ranks - 1]) + ascending[-1]
    return max(-(-total // ranks), beside_largest) * ranks / total if total else 1.0


def bound_with_copies(rows_E: Sequence[int], ranks: int, slots: int) -> float:
    """Return a lower bound of max/mean with E / W experts and `slots` copies on each rank.

    A rank has at most the rows of its own experts and of the `slots` largest of the others; the
    bound is the least level to which the ranks, each up to that, take all rows.

    Args:
        rows_E: of each expert; rank r holds the r-th run of E / W.
        ranks: W.
        slots: copies per rank.
    """
    per_rank, total = len(rows_E) // ranks, sum(rows_E)
    room = []
    for start in range(0, len(rows_E), per_rank):
        others = sorted([*rows_E[:start], *rows_E[start + per_rank :]], reverse=True)
        room.append(sum(rows_E[start : start + per_rank]) + sum(others[:slots]))
    left, level = total, 0
    for done, most in enumerate(sorted(room)):
        level = -(-left // (ranks - done))
        if level <= most:
            break
        left -= most
    return level * ranks / total if total else 1.0
