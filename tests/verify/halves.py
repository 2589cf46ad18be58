"""Halves of the cases of a plan, in which any two of EP, exchange and mode meet in all values."""

from __future__ import annotations

from dataclasses import replace

from dmoe.verify.cases import Case, CasePlan


def in_half(case: Case, half: int) -> bool:
    """Return True if the case is in this half (0 or 1).

    Both halves have the cases of one process; recomputation is in half 0.
    """
    if case.world == 1:
        return True
    if case.recompute:
        return half == 0
    return (case.ep.bit_length() + (case.exchange == "padded") + (case.mode == "fsdp")) % 2 == half


def half_of(plan: CasePlan, half: int, min_ep: int = 1) -> CasePlan:
    """Return the plan with the cases of a half; on several ranks from `min_ep`."""
    cases = [case for case in plan.cases if case.world == 1 or case.ep >= min_ep]
    return replace(plan, cases=[case for case in cases if in_half(case, half)])
