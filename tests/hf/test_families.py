"""Every family of docs/models.md equals plain transformers, at EP = 1 and EP = 2."""

from __future__ import annotations

import pytest

from tests.hf.families import FAMILIES
from tests.hf.table import Row, measure_all, written_families

TOLERANCE = 1e-13
"""In float64, with what transformers computes in float32 in float64 too."""


def check(row: Row) -> None:
    assert row.largest < TOLERANCE, row
    assert row.drops_1 == row.drops_2 > 0, row


def test_a_family_equals_transformers() -> None:
    """A sample of the ranks tier: clamps, biases and interleaved stacks; a bias of the choice."""
    for row in measure_all(["gpt_oss", "lfm2_moe"]):
        check(row)


@pytest.mark.ranks
def test_every_family_equals_transformers() -> None:
    rows = measure_all([family for family in FAMILIES if family not in ("gpt_oss", "lfm2_moe")])
    for row in rows:
        check(row)


def test_the_document_has_every_family() -> None:
    assert written_families() == list(FAMILIES)
