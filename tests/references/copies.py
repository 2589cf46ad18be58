"""Naive twins of the copy planner, and the best that any choice of copies can reach."""

from __future__ import annotations

from itertools import combinations, product

from dmoe.moe.copy_planner import CopyPlan, Move

Counts = list[list[int]]


def divided(count_PE: Counts, moves: tuple[Move, ...]) -> list[dict[tuple[int, int], int]]:
    """Divide rows one at a time: per source rank, rows by (rank that computes, expert).

    Those of a rank that computes the expert itself come first, up to its share; then the others, in
    the order of their source, go to the first rank whose share is not used up.
    """
    ranks, per_rank = len(count_PE), len(count_PE[0]) // len(count_PE)
    sent: list[dict[tuple[int, int], int]] = [{} for _ in range(ranks)]
    for expert in range(len(count_PE[0])):
        share = {move.rank: move.rows for move in moves if move.expert == expert}
        home = expert // per_rank
        share[home] = sum(row[expert] for row in count_PE) - sum(share.values())
        waiting = []
        for source, row in enumerate(count_PE):
            for _ in range(row[expert]):
                if share.get(source, 0):
                    share[source] -= 1
                    key = source, expert
                    sent[source][key] = sent[source].get(key, 0) + 1
                else:
                    waiting.append(source)
        for source in waiting:
            rank = min(rank for rank, left in share.items() if left)
            share[rank] -= 1
            key = rank, expert
            sent[source][key] = sent[source].get(key, 0) + 1
        assert not any(share.values()), "a share is not used up"
    return sent


def sent_of(plan: CopyPlan) -> list[dict[tuple[int, int], int]]:
    """Return a plan's division in the form of `divided`."""
    edges = plan.edge_P.tolist()
    rank_I = [r for r in range(plan.ranks) for _ in range(edges[r], edges[r + 1])]
    keys = list(zip(rank_I, plan.expert_I.tolist(), strict=True))
    return [
        {key: int(rows) for key, rows in zip(keys, rows_I, strict=True) if rows}
        for rows_I in plan.rows_PI
    ]


def best_level(count_PE: Counts, slots: int) -> int:
    """Return the fewest rows of the fullest rank over every choice of copies, by exhaustion.

    For given copies, the rows of a set S of experts must fit into the ranks that hold one of them:
    the level is the largest of ceil(rows(S) / ranks(S)) over all S (Hall's condition).
    """
    ranks, experts = len(count_PE), len(count_PE[0])
    per_rank = experts // ranks
    load = [sum(row[e] for row in count_PE) for e in range(experts)]
    sets = [s for n in range(1, experts + 1) for s in combinations(range(experts), n)]
    choices = []
    for rank in range(ranks):
        others = [e for e in range(experts) if e // per_rank != rank]
        choices.append(list(combinations(others, min(slots, len(others)))))
    best = sum(load)
    for copies in product(*choices):
        holders = [
            {e // per_rank} | {rank for rank, own in enumerate(copies) if e in own}
            for e in range(experts)
        ]
        level = max(
            -(-sum(load[e] for e in s) // len(set.union(*(holders[e] for e in s)))) for s in sets
        )
        best = min(best, level)
    return best
